"""Two lines in a plain training loop: a student learns from noisy labels, and its average teaches it."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from wmateacher import WMATeacher, losses

EPOCHS, BATCH = 20, 64


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    labels = torch.from_numpy(digits.target)
    order = torch.randperm(len(labels))
    train, test = order[:600], order[600:]
    noisy = labels.clone()
    wrong = train[torch.rand(len(train)) < 0.4]
    noisy[wrong] = torch.randint(0, 10, (len(wrong),))

    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(512, 10)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    total_steps = EPOCHS * (len(train) // BATCH)
    # Random initial weights should count little; for fine-tuning, "beta(0.5,0.5)" keeps the pretrained ones.
    teacher = WMATeacher(model, kernel="beta(2,1)", total_steps=total_steps)  # the first line
    distill = losses.build("kl")

    def accuracy(module: nn.Module) -> float:
        with torch.no_grad():
            return (module(images[test]).argmax(1) == labels[test]).float().mean().item() * 100

    for epoch in range(EPOCHS):
        for batch in train[torch.randperm(len(train))].split(BATCH):
            if len(batch) < BATCH:
                continue
            logits = model(images[batch])
            loss = F.cross_entropy(logits, noisy[batch]) + distill(logits, teacher(images[batch]))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            teacher.update()  # the second line
        if epoch % 5 == 4:
            print(f"epoch {epoch + 1}: student {accuracy(model):.1f}%, teacher {accuracy(teacher):.1f}%")


if __name__ == "__main__":
    main()
