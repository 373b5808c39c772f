"""The on-disk format: spec, codecs, tar, ``.npy``, sealed records, table schemas, file names (``docs/format.md``)."""
