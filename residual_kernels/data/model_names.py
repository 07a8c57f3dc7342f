"""What do models' names begin with? Light enough for `--help`."""

BUNDLED = "bundled"
TRANSFORMERS = "hf:"
