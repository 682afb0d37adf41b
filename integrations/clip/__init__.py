"""CLIP fine-tuning with a teacher."""
