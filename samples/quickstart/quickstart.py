"""The shortest way from a module to a file that ``vlexport build`` takes: writes ``model.pt``."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlexport


class TinyNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, kernel_size=3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, image: Tensor) -> Tensor:
        features = F.relu(self.norm(self.conv(image)))
        return self.head(features.mean(dim=(2, 3)))


torch.manual_seed(0)
model = TinyNet()
model(torch.randn(64, 3, 64, 64))  # stands in for training: the norm sees some data
model.eval()

vlexport.save(model, "model.pt", inputs=torch.randn(1, 3, 64, 64))
