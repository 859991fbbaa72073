"""From a source to a published blob: one flight a digest, in ranges, resumable, hashed."""
