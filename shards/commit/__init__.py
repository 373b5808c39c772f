"""How a shard becomes part of a cache: write, claim, commit, finish, in a folder or in a bucket."""
