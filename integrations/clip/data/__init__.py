"""Image-text data for CLIP: drawn digits, class folders, captions, shards, ImageNet and its shifts."""
