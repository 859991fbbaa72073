"""The disk: layout, unfinished and finished blobs, snapshots, and what a scan finds. Never knows why."""
