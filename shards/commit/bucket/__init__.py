"""The commit protocol on an object store: conditional writes in place of rename and link."""
