"""Images: decoding, pixel ranges, masks."""
