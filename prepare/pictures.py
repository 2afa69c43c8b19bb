"""One picture as training sees it: a Pillow image becomes an array, and what was lost or changed on the way is counted.

Why counted: a set of a million files has a few hundred odd ones, and nobody looks at each; a line that says "images
with transparency, put on white: 12" tells what to look for."""

import warnings
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms, ImageOps

from data import to_picture

warnings.filterwarnings("ignore", module="PIL")  # whatever matters is raised


@lru_cache(maxsize=64)
def transform_to_srgb(profile, mode):
    """How to convert images of `mode` from a colour profile (its bytes) to sRGB; None if they look the same there.
    Raises PyCMSError for a damaged profile, or one of other colours."""
    transform = ImageCms.buildTransform(ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB"),
                                        mode, "RGB")
    if mode == "CMYK":
        return transform
    steps = np.linspace(0, 255, 6).astype(np.uint8)
    samples = np.stack(np.meshgrid(*[steps] * len(mode)), -1).reshape(1, -1, len(mode))  # (1, N, 1 or 3)
    picture = Image.fromarray(samples[..., 0] if mode == "L" else samples)
    converted = np.asarray(ImageCms.applyTransform(picture, transform)).astype(int)
    return transform if abs(converted - samples).max() > 8 else None


def apply_profile(image, changes):
    """An image of mode L, RGB, RGBA or CMYK in the colours of sRGB."""
    profile = image.info.get("icc_profile")
    if not profile:
        if image.mode == "CMYK":
            changes["of CMYK without a colour profile, converted roughly"] += 1
        return image
    mode = "RGB" if image.mode == "RGBA" else image.mode
    try:
        transform = transform_to_srgb(profile, mode)
    except (ImageCms.PyCMSError, OSError):
        changes["with a colour profile that does not fit them, taken as sRGB"] += 1
        return image
    if not transform:
        return image
    changes["with a colour profile, converted to sRGB"] += 1
    converted = ImageCms.applyTransform(image.convert(mode), transform)
    if image.mode == "RGBA":
        converted.putalpha(image.getchannel("A"))
    return converted.convert("L") if image.mode == "L" else converted


def from_deep_grey(image, changes):
    """A grey image of 16 bits as one of 8."""
    values = np.asarray(image).astype(np.int64)
    if image.format == "TIFF" and image.tag_v2.get(262) == 0:  # where 0 is white
        values = 65535 - values
    if values.max() < 4096:
        changes["of 12 bits or fewer in 16, which become almost black; spread them over 16 bits first"] += 1
    grey = Image.fromarray(np.round(values / 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # the value of transparent pixels
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def from_picture(image, changes):
    """A Pillow image as uint8 (1 or 3, H, W). changes: counts what is changed; what cannot be had raises ValueError."""
    pages = getattr(image, "n_frames", 1)
    if pages > 1 and image.format == "TIFF":
        changes["of several pages, of which the first is taken"] += 1
    elif pages > 1 and image.format != "MPO":  # MPO: a phone's photo with a second
        raise ValueError(f"is animated, {pages} frames")
    deep = any(";16" in str(tile[3]) for tile in image.tile) or (image.format == "PPM" and image.mode == "I")
    image.load()
    if image.info or image.format in ("TIFF", "MPO"):  # where an orientation would be
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F") and not deep:
        kind = "whole numbers" if image.mode == "I" else "real numbers"
        raise ValueError(f"has {kind} of 32 bits; save it with 8 or 16 bits a channel")
    if deep:
        changes["of 16 bits a channel, rounded to 8"] += 1
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = from_deep_grey(image, changes)
    grey = Image.getmodebase(image.mode) == "L"
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if grey else "RGB")
    image = apply_profile(image, changes)
    if image.mode == "RGBA" and image.getchannel("A").getextrema()[0] < 255:
        changes["with transparency, put on white"] += 1
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    mode = "L" if grey else "RGB"
    return np.atleast_3d(image if image.mode == mode else image.convert(mode)).transpose(2, 0, 1)


def crop_and_resize(image, size, channels, changes):
    """The central square of an image (C, H, W), resized to `size` if that is given, in grey or in colour."""
    C, H, W = image.shape
    if image.dtype != np.uint8 or (H == W and size in (None, H) and C == channels):
        return image
    side = min(H, W)
    changes["not square, cropped to their centre"] += H != W
    changes["smaller than asked for, enlarged"] += side < (size or 0)
    changes["grey, made colour as others are"] += C < channels
    top, left = (H - side) // 2, (W - side) // 2
    picture = to_picture(image[:, top:top + side, left:left + side]).convert("L" if channels == 1 else "RGB")
    picture = picture.resize((size, size), Image.Resampling.LANCZOS) if size else picture
    return np.atleast_3d(picture).transpose(2, 0, 1)
