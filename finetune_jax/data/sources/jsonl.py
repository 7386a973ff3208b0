"""`jsonl`: texts and labels as a JSON object a line.

`config.data.dir` is a folder with train.jsonl, dev.jsonl, test.jsonl, or one file.
"""

from finetune_jax.data.text.files import read_json_lines

KINDS = ("text",)
READ = read_json_lines
SUFFIX = ".jsonl"
