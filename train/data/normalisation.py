"""The mean and the deviation by which the loaders normalise the colours of images."""

from sdnet.train.data.loader import Program

Channels = tuple[float, float, float]

NORMS: dict[Program, tuple[Channels, Channels]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "cifar": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}
"""Mean and deviation of red, green and blue in [0, 1], by the program that trains; its stem has the same name.

For CIFAR they are CIFAR-10's mean and the usual deviation: the mean of the deviations of the single images.
"""
