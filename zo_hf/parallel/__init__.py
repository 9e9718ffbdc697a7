"""Running on several processes: ranks, sharded weights, and checksums."""
