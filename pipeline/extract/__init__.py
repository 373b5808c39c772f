"""An extraction: plan, shards, progress, the end of the job."""
