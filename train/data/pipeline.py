"""What DALI does with a batch of encoded pictures."""

from collections.abc import Callable
from typing import Any

from nvidia.dali import fn, math
from nvidia.dali.auto_aug import rand_augment, trivial_augment
from nvidia.dali.pipeline import Pipeline, pipeline_def
from nvidia.dali.types import DALIDataType, DALIImageType

# ImageNet's statistics of RGB in [0, 255].
MEAN = [255 * value for value in (0.485, 0.456, 0.406)]
STD = [255 * value for value in (0.229, 0.224, 0.225)]


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
    """A pipeline from the encoded pictures of `source(step)` to images [B, 3, size, size] or [B, size, size, 3].

    Nothing follows a rotation flag. Every random operator is seeded by the pipeline's seed; `options` are DALI's.
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
            shape = fn.peek_image_shape(encoded, adjust_orientation=False)
            scaled = resize * shape[:2] // math.min(shape[0], shape[1])
            images = fn.resize(images, size=fn.cast(scaled, dtype=DALIDataType.FLOAT), antialias=True)
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
