"""Labels, preprocessing, architecture and tokenizer, stored beside weights."""
