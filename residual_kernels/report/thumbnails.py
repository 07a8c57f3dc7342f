"""Small pictures inside the page: square JPEG files as data URIs, each image once."""

import base64
import io

from PIL import ImageOps
from PIL.Image import Image

from residual_kernels.data.images import Images

SIDE, QUALITY = 80, 82  # pixels; about 2 kB each
MOST = 1600  # in one report, about 5 MB


def cropped(image: Image, side: int) -> Image:
    """The middle square, at most `side` pixels wide; small images are not enlarged."""
    width = min(side, *image.size)
    return ImageOps.fit(image.convert("RGB"), (width, width))


def data_uri(image: Image) -> str:
    buffer = io.BytesIO()
    cropped(image, SIDE).save(buffer, format="JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def thumbnails(images: Images, strips: list[list[int]], most: int = MOST) -> tuple[dict[int, str], int]:
    """Data URIs by index of the images in the first strips that hold at most `most`, and how many strips
    those are."""
    wanted: dict[int, None] = {}
    kept = 0
    for strip in strips:
        more = dict.fromkeys(strip)
        if len(wanted | more) > most:
            break
        wanted |= more
        kept += 1
    return {index: data_uri(images.picture(index)[0]) for index in wanted}, kept
