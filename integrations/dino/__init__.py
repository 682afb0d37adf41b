"""DINO: self-distillation without labels, its teacher a plain `WMATeacher`."""
