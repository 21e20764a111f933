"""Cut short looping animations out of videos, for the README.

    python docs/film_strip.py docs/pictures/walker-walk.webp runs/NAME/video-....mp4

`dynajax play RUN --video` records a video. The animation is in WebP: five seconds from second 3 on,
at 20 frames per second.
"""

import sys

import imageio.v3
from PIL import Image

START, SECONDS, RATE, WIDTH = 3, 5, 20, 264

if __name__ == "__main__":
    target, video = sys.argv[1:]
    fps = imageio.v3.immeta(video)["fps"]
    frames = imageio.v3.imread(video)
    chosen = [int(fps * (START + i / RATE)) for i in range(SECONDS * RATE)]
    height, width = frames.shape[1:3]
    left = (width - height * 4 // 3) // 2  # the middle, four by three
    box = (max(left, 0), 0, width - max(left, 0), height)
    images = [Image.fromarray(frames[i]).crop(box) for i in chosen if i < len(frames)]
    size = (WIDTH, round(WIDTH * images[0].height / images[0].width))
    first, *others = [image.resize(size, Image.Resampling.LANCZOS) for image in images]
    first.save(
        target,
        save_all=True,
        append_images=others,
        duration=1000 // RATE,
        loop=0,
        quality=50,
        method=6,
    )
