"""The DALI pipeline that decodes and augments a batch of encoded images."""

from collections.abc import Callable
from typing import Any

import numpy as np
from nvidia.dali import fn, math
from nvidia.dali.auto_aug import rand_augment, trivial_augment
from nvidia.dali.pipeline import Pipeline, pipeline_def
from nvidia.dali.types import DALIDataType, DALIImageType

from sdnet.train.data.normalisation import NORMS

MEAN, STD = ([255 * value for value in values] for values in NORMS["imagenet"])


def make_pipeline(
    source: Callable[[int], list[Any]],
    *,
    size: int,
    resize: int,
    augment: bool,
    extras: str,
    decoder: str,
    hw_decoder_load: float,
    layout: str,
    half: bool,
    **options: Any,
) -> Pipeline:
    """Build a pipeline from the encoded images of `source(step)` to normalised images.

    Rotation flags are not applied. Every random operator is seeded by the seed of the pipeline.

    Args:
        source: Return the encoded images of a step, [bytes] uint8 each.
        size: Height and width of the output.
        resize: The shorter side before the centre crop; evaluation only.
        augment: True for a random crop and flip, False for the centre crop.
        extras: "none", "trivial" or "rand"; see `DaliLoader`.
        decoder: "cpu", or "mixed" to decode on the GPU.
        hw_decoder_load: Share of a batch for the GPU's JPEG unit.
        layout: "CHW" or "HWC".
        half: Give fp16 instead of fp32.
        options: Arguments of DALI's `Pipeline`.

    Returns:
        The pipeline; its output is [B, 3, size, size], or [B, size, size, 3] for "HWC".
    """
    load = {"hw_decoder_load": hw_decoder_load} if decoder == "mixed" else {}
    decoding = {"device": decoder, "output_type": DALIImageType.RGB, "adjust_orientation": False, **load}

    def graph() -> Any:
        images: Any
        encoded: Any = fn.external_source(
            source=source, batch=True, no_copy=True, device="cpu", dtype=DALIDataType.UINT8, ndim=1
        )
        if augment:
            images = fn.decoders.image_random_crop(
                encoded, random_area=[0.08, 1.0], random_aspect_ratio=[3 / 4, 4 / 3], num_attempts=10, **decoding
            )
            images = fn.resize(images, size=(size, size), antialias=True)
            if extras == "trivial":
                images = trivial_augment.trivial_augment_wide(images, fill_value=128)
            elif extras == "rand":
                images = rand_augment.rand_augment(images, n=2, m=9, fill_value=128)
            mirror = fn.random.coin_flip()
        else:
            images = fn.decoders.image(encoded, **decoding)
            images = _centre(images, fn.peek_image_shape(encoded, adjust_orientation=False)[:2], size, resize)
            mirror = 0
        return fn.crop_mirror_normalize(
            images,
            crop=(size, size),
            rounding="truncate",
            mirror=mirror,
            mean=MEAN,
            std=STD,
            dtype=DALIDataType.FLOAT16 if half else DALIDataType.FLOAT,
            output_layout=layout,
        )

    made: Any = pipeline_def(enable_conditionals=augment and extras != "none")(graph)
    return made(**options)


def decode(data: bytes, decoder: str, device_id: int | None) -> np.ndarray:
    """Decode one image with DALI.

    Args:
        data: The encoded image.
        decoder: "cpu", or "mixed" to decode on the GPU.
        device_id: The GPU, None for the CPU.

    Returns:
        The pixels, [H, W, 3] uint8.

    Raises:
        RuntimeError: DALI cannot decode it.
    """

    def graph() -> Any:
        encoded: Any = fn.external_source(source=lambda: [np.frombuffer(data, np.uint8)], batch=True)
        images: Any = fn.decoders.image(
            encoded, device=decoder, output_type=DALIImageType.RGB, adjust_orientation=False
        )
        return images.cpu()

    options: dict[str, Any] = {"batch_size": 1, "num_threads": 1, "device_id": device_id}
    made: Any = pipeline_def(**options)(graph)
    (images,) = made().run()
    return np.array(images.at(0))


def _centre(images: Any, extent: Any, size: int, resize: int) -> Any:
    """Resize the shorter side to `resize` and crop the centre to `size`, in one operator.

    Only the crop is computed: resizing the whole of a 1 x 10000 image would take gigabytes. The sizes are rounded down
    as Pillow's users do it, `extent` is [height, width].
    """
    scaled: Any = fn.cast(resize * extent // math.min(extent[0], extent[1]), dtype=DALIDataType.FLOAT)
    start, pixel = math.floor((scaled - size) / 2), extent / scaled
    return fn.resize(images, size=(size, size), roi_start=start * pixel, roi_end=(start + size) * pixel, antialias=True)
