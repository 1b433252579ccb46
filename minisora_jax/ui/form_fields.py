"""The forms of the page, one for each task: title, hint, fields, default length and examples."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Form:
    """The form of a task. `needs` names its files and settings beside the prompt."""

    title: str
    hint: str
    needs: tuple[str, ...]
    length: str  # the default; "" for the length of the video
    examples: tuple[tuple[str, str], ...]  # (prompt, the name of a set of files in examples.py)


PLAIN = "a large red circle moves left slowly on a black background"
FORMS = {
    "text_to_video": Form(
        "Video",
        "A video from a prompt.",
        (),
        "17 frames",
        (
            (PLAIN, ""),
            ("a small cyan triangle bounces off the walls on a navy background", ""),
            ("a red circle moves up and a blue square stays still on a grey background", ""),
            ("the camera pans right past a small green cross on a checkered background", ""),
        ),
    ),
    "text_to_image": Form(
        "Image",
        "A picture from a prompt, up to 2048x2048 pixels.",
        (),
        "1 frame",
        (
            ("a photo of a large blue square on a grey background", ""),
            ("a photo of a small green triangle on a navy background", ""),
        ),
    ),
    "long_video": Form(
        "Long video",
        "A video of up to a minute. The prompt after [4s] begins at 4 seconds.",
        (),
        "9 s",
        (
            ("a red circle grows on a black background [4s] a red circle moves up on a black background", ""),
            ("a white square moves in a circle on a navy background", ""),
        ),
    ),
    "loop": Form(
        "Loop",
        "A video whose end meets its beginning. With a video: frames that lead from its end to its beginning.",
        ("video",),
        "16 frames",
        (
            ("a large yellow circle moves in a circle on a black background", ""),
            ("a large red circle moves left on a black background", "clip"),
        ),
    ),
    "image_to_video": Form(
        "Image to video",
        "The picture is the first frame, and the prompt says what happens.",
        ("image",),
        "17 frames",
        (("a large red circle moves right on a black background", "picture"),),
    ),
    "interpolate": Form(
        "Interpolate",
        "A video from one picture to another.",
        ("image", "last"),
        "17 frames",
        (("a large red circle moves right on a black background", "two pictures"),),
    ),
    "video_to_video": Form(
        "Video to video",
        "A video changed by a new prompt. Strength 0 keeps it, strength 1 makes all of it new.",
        ("video", "strength"),
        "",
        (("a large blue circle moves left on a black background", "clip"),),
    ),
    "inpaint": Form(
        "Inpaint",
        "The white parts of the mask are generated. All other pixels stay the same.",
        ("video", "mask"),
        "",
        (("a large green circle moves left on a black background", "clip and mask"),),
    ),
    "outpaint": Form(
        "Outpaint",
        "The video in a larger frame. The new edges are generated.",
        ("video", "grow"),
        "",
        (("a small red circle moves left on a black background", "clip"),),
    ),
    "extend": Form(
        "Extend",
        "New frames after a video, before it, or both.",
        ("video", "side"),
        "1 s",
        (("a large red circle moves left on a black background", "clip"),),
    ),
    "transition": Form(
        "Transition",
        "Frames that lead from one video to another.",
        ("video", "second"),
        "1 s",
        (("a large red circle moves left on a black background", "two clips"),),
    ),
}
FILES = {  # field -> (the kind that uploads.py checks, its label)
    "image": ("picture", "Picture"),
    "last": ("picture", "Last picture"),
    "video": ("video", "Video"),
    "second": ("video", "Video that follows"),
    "mask": ("mask", "Mask (white is generated)"),
}
MISSING = {
    "image": "choose a picture",
    "last": "choose the last picture",
    "video": "choose a video",
    "second": "choose the video that follows",
    "mask": "choose a mask: a picture, or a video with as many frames",
}
GROWN = {"1.25 times": 1.25, "1.33 times": 4 / 3, "1.5 times": 1.5, "2 times": 2.0}
