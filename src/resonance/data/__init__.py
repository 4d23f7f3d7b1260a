"""From recordings and transcripts to batches: manifests, audio, features, tokens."""
