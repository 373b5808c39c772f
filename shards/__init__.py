"""The contract between the two stages: the cache format, its writer, its readers. Knows no model."""

VERSION = "0.1.0"
