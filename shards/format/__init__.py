"""The bytes on disk: spec, codecs, tar, ``.npy``, sealed records, table schemas, file names (docs/format.md)."""
