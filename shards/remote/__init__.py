"""Files behind a URL: how they are fetched, kept in a local mirror, and read without their tars."""
