"""The purifier as a service (Ray Serve) and over many files on a cluster (Ray Data); the extra ``serve``."""
