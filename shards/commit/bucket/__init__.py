"""The commit protocol on an object store: conditional writes instead of rename and link."""
