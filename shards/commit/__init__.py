"""The commit protocol: claim, write, commit and finalize shards in a folder or a bucket."""
