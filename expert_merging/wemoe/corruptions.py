"""Seven ways to spoil an image, at severity 2: after ImageNet-C (Hendrycks and Dietterich 2019), with its constants.

Written anew on numpy and SciPy, not bit for bit the original: motion blur and spatter there go through ImageMagick and
OpenCV. Sizes of blurs are the original's at 224 pixels and shrink with the image. A function takes a PIL image and a
generator and gives a PIL image of the same size.
"""

import io
from collections.abc import Callable

import numpy as np
from PIL import Image
from scipy import ndimage


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def contrast(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """0.3 of the distance to each channel's mean."""
    pixels = _pixels(image)
    mean = pixels.mean(axis=(0, 1), keepdims=True)
    return _image((pixels - mean) * 0.3 + mean)


def gaussian_noise(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Normal noise, standard deviation 0.12."""
    pixels = _pixels(image)
    return _image(pixels + 0.12 * random.standard_normal(pixels.shape))


def impulse_noise(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Salt and pepper on 6% of the values."""
    pixels = _pixels(image)
    hit, salt = random.random(pixels.shape) < 0.06, random.random(pixels.shape) < 0.5
    return _image(np.where(hit, salt.astype(float), pixels))


def jpeg_compression(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """JPEG at quality 18."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=18)
    return Image.open(buffer).convert("RGB")


def motion_blur(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Along a line of random direction within 45 degrees of the horizontal: half a Gaussian, radius 15, sigma 5."""
    pixels = _pixels(image)
    scale = min(pixels.shape[:2]) / 224
    radius, sigma = max(1, round(15 * scale)), max(0.3, 5 * scale)
    angle = np.deg2rad(random.uniform(-45, 45))
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    made = np.zeros_like(pixels)
    for step, weight in enumerate(weights / weights.sum()):
        shift = (step * np.sin(angle), step * np.cos(angle), 0)
        made += weight * ndimage.shift(pixels, shift, order=1, mode="nearest")
    return _image(made)


def pixelate(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Half the pixels a side."""
    width, height = image.size
    small = image.convert("RGB").resize((max(1, width // 2), max(1, height // 2)), Image.Resampling.BOX)
    return small.resize((width, height), Image.Resampling.NEAREST)


def spatter(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Drops of water: where smooth noise (mean 0.65, deviation 0.3, sigma 3) is above 0.68, lit from the edges, 0.6."""
    pixels = _pixels(image)
    scale = min(pixels.shape[:2]) / 224
    liquid = ndimage.gaussian_filter(random.normal(0.65, 0.3, pixels.shape[:2]), 3 * scale)
    liquid[liquid < 0.68] = 0
    edges = np.minimum(
        ndimage.distance_transform_edt(ndimage.sobel(liquid, 0) ** 2 + ndimage.sobel(liquid, 1) ** 2 < 1e-3), 20
    )
    light = ndimage.gaussian_filter(1 - edges / 20, max(0.3, scale))
    mask = liquid * light
    mask = 0.6 * mask / mask.max() if mask.max() > 0 else mask
    water = np.array([175, 238, 238]) / 255
    return _image(pixels + mask[..., None] * water)


CORRUPTIONS: dict[str, Callable[[Image.Image, np.random.Generator], Image.Image]] = {
    function.__name__: function
    for function in (contrast, gaussian_noise, impulse_noise, jpeg_compression, motion_blur, pixelate, spatter)
}


def corrupting(name: str, seed: int) -> Callable[[Image.Image, int], Image.Image]:
    """(image, index) -> the corrupted image: the same each time for the same index."""
    return lambda image, index: CORRUPTIONS[name](image, np.random.default_rng([seed, index]))
