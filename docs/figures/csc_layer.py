"""Draw csc_layer.png: what a convolutional sparse-coding layer computes, on a real picture.

    python docs/figures/csc_layer.py

The script needs only matplotlib, which installs numpy and pillow and has the portrait of Grace Hopper in its sample
data. The dictionary is a fixed bank of oriented edges and bars, each with both signs; a trained layer learns its own.
"""

import io
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import cbook
from matplotlib.patches import FancyArrowPatch
from PIL import Image

INK, SOFT, ACCENT = "#20242c", "#8a92a0", "#c4512d"
SIZE, ATOM, LAM = 120, 11, 0.25
SHOWN = (1, 2, 8, 64)  # steps


def photograph() -> np.ndarray:
    """Return a grey crop with mean 0, [SIZE, SIZE]."""
    rgb = plt.imread(str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))) / 255.0
    grey = rgb[30:390, 76:436].mean(axis=2)
    grey = grey.reshape(SIZE, 3, SIZE, 3).mean(axis=(1, 3))
    return grey - grey.mean()


def dictionary(angles: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Return unit-norm atoms [C, ATOM, ATOM] and their angles in [0, 1)."""
    t = np.arange(ATOM) - ATOM // 2
    v, u = np.meshgrid(t, t, indexing="ij")
    atoms, angle = [], []
    for k in range(angles):
        across = u * np.cos(np.pi * k / angles) + v * np.sin(np.pi * k / angles)
        for phase in (0, np.pi / 2, np.pi, 3 * np.pi / 2):
            atoms.append(np.exp(-(u**2 + v**2) / 11) * np.cos(0.75 * across + phase))
            angle.append(k / angles)
    atoms = np.stack(atoms)
    return atoms / np.sqrt((atoms**2).sum(axis=(1, 2), keepdims=True)), np.array(angle)


def fista(x: np.ndarray, atoms: np.ndarray, steps: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the codes [C, H, W] and their reconstructions [H, W] after each step, with circular convolutions."""
    kernel = np.zeros((len(atoms), *x.shape))
    kernel[:, :ATOM, :ATOM] = atoms
    spectrum = np.fft.rfft2(np.roll(kernel, (-(ATOM // 2), -(ATOM // 2)), axis=(1, 2)))
    step = 0.9 / (np.abs(spectrum) ** 2).sum(axis=0).max()  # 0.9 / largest eigenvalue of A'A

    def synthesis(z: np.ndarray) -> np.ndarray:  # A z
        return np.fft.irfft2((np.fft.rfft2(z) * spectrum).sum(axis=0), s=x.shape)

    def analysis(r: np.ndarray) -> np.ndarray:  # A' r
        return np.fft.irfft2(np.fft.rfft2(r) * spectrum.conj(), s=x.shape)

    z = y = np.zeros((len(atoms), *x.shape))
    t, codes, pictures = 1.0, [], []
    for _ in range(steps):
        z_next = np.maximum(y + step * analysis(x - synthesis(y)) - step * LAM, 0)
        t_next = (1 + np.sqrt(1 + 4 * t * t)) / 2
        y = z_next + (t - 1) / t_next * (z_next - z)
        z, t = z_next, t_next
        codes.append(z)
        pictures.append(synthesis(z))
    return codes, pictures


def coloured(z: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Return the largest code at each pixel in the colour of its angle, on white."""
    best = z.argmax(axis=0)
    strength = np.clip(z.max(axis=0) / np.quantile(z.max(axis=0), 0.99), 0, 1)[..., None]
    return 1 - strength * (1 - hue(angle[best]))


def hue(angle: np.ndarray) -> np.ndarray:
    """Return a colour for each angle, cyclic like the angles."""
    phase = 2 * np.pi * (np.asarray(angle)[..., None] - np.array([0, 1, 2]) / 3)
    return 0.5 + 0.42 * np.cos(phase)


def main() -> None:
    """Draw the figure and print how many codes are active after each number of steps."""
    x = photograph()
    atoms, angle = dictionary()
    codes, pictures = fista(x, atoms, max(SHOWN))

    plt.rcParams.update({"font.family": "DejaVu Sans", "mathtext.fontset": "cm", "text.color": INK})
    width, height, side = 13.0, 5.1, 1.72
    figure = plt.figure(figsize=(width, height), dpi=120, facecolor="white")

    def panel(image: np.ndarray, left: float, bottom: float, frame: str = "#d5d9e0") -> None:
        ax = figure.add_axes((left / width, bottom / height, side / width, side / height))
        grey = {"cmap": "gray", "vmin": x.min(), "vmax": x.max()} if image.ndim == 2 else {}
        ax.imshow(image, interpolation="nearest", **grey)
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set(color=frame, linewidth=1.0 if frame != ACCENT else 2.0)

    def text(left: float, bottom: float, words: str, **style: object) -> None:
        figure.text(left / width, bottom / height, words, **{"ha": "center", "va": "center", "fontsize": 11, **style})

    def arrow(start: tuple[float, float], end: tuple[float, float], colour: str = SOFT) -> None:
        scale = np.array([width, height])
        figure.add_artist(
            FancyArrowPatch(
                tuple(np.array(start) / scale),
                tuple(np.array(end) / scale),
                transform=figure.transFigure,
                arrowstyle="-|>",
                mutation_scale=13,
                color=colour,
                linewidth=1.3,
            )
        )

    upper, lower, first = 2.42, 0.32, 4.0
    panel(x, 0.3, upper)
    text(0.3 + side / 2, upper + side + 0.17, "$x$   input")

    # The dictionary: one framed atom per phase (rows) and angle (columns).
    cell = 2.5 / 8
    for i, atom in enumerate(atoms):
        left, bottom = 0.3 + i // 4 * cell, lower + (3 - i % 4) * cell
        ax = figure.add_axes((left / width, bottom / height, 0.88 * cell / width, 0.88 * cell / height))
        ax.imshow(atom, cmap="gray", vmin=-np.abs(atom).max(), vmax=np.abs(atom).max())
        ax.set(xticks=[], yticks=[])
        for spine in ax.spines.values():
            spine.set(color=hue(angle[i]), linewidth=1.8)
    text(0.3 + 1.25, lower + 4 * cell + 0.17, "$A$   dictionary (weight)")

    gap = (width - first - 0.3 - 4 * side) / 3
    for i, steps in enumerate(SHOWN):
        left = first + i * (side + gap)
        default = steps == 2
        panel(coloured(codes[steps - 1], angle), left, upper, ACCENT if default else "#d5d9e0")
        panel(pictures[steps - 1], left, lower, ACCENT if default else "#d5d9e0")
        name = {1: "1 step", 2: "2 steps: the default"}.get(steps, f"{steps} steps")
        text(left + side / 2, upper + side + 0.17, name, color=ACCENT if default else INK)
        arrow((left + side / 2, upper - 0.05), (left + side / 2, lower + side + 0.05))
        if i:
            arrow((left - gap + 0.07, upper + side / 2), (left - 0.07, upper + side / 2))
    text(first - 0.17, upper + side / 2, "codes   $z$", rotation=90)
    text(first - 0.17, lower + side / 2, "picture   $A z$", rotation=90)
    arrow((0.3 + side + 0.1, upper + side / 2), (first - 0.4, upper + side / 2))
    text((0.2 + side + first) / 2, upper + side / 2 + 0.2, "unrolled FISTA", color=SOFT)
    text(
        width / 2,
        height - 0.32,
        r"$z_{k+1} = P\,(\,y_k + s\,A'(x - A\,y_k)\,)\qquad\qquad P(v) = \max(v - s\lambda,\ 0)$",
        fontsize=17,
    )
    file = io.BytesIO()
    figure.savefig(file, format="png")
    pixels = Image.open(file).convert("RGB")
    pixels.quantize(256, dither=Image.Dither.NONE).save(Path(__file__).with_suffix(".png"), optimize=True)
    for steps in SHOWN:
        active, error = (codes[steps - 1] > 0).mean(), ((x - pictures[steps - 1]) ** 2).sum() / (x**2).sum()
        print(f"{steps:2} steps: {active:.1%} of the codes active, ||x - Az||² is {error:.1%} of ||x||²")


if __name__ == "__main__":
    main()
