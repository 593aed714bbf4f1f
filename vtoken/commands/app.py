"""`vtoken app`: a page in the browser that asks a model about a picture or a video, dense and pruned."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from vtoken.errors import VtokenError
from vtoken.evals.shared.options import FRAMES, DeviceOptions, argument, as_json, option

if TYPE_CHECKING:
    from vtoken.evals.pictures.asked import Answerer

DESCRIPTION = """\
Serves a page: picture or video, question, method and budget go in; the kept tokens, the answers dense and
pruned, tokens and seconds come out. Ctrl-C ends it."""
EXAMPLES = """examples:
  vtoken app                                              # the shipped model, http://127.0.0.1:7860
  vtoken app llava-hf/llava-1.5-7b-hf --dtype bfloat16    # a model of yours
  vtoken app tiny-llava --host 0.0.0.0 --port 8000        # for other machines of the network too

Asks dense, then pruned, one run each: the seconds are a hint, vtoken bench measures. Needs pip install "gradio>=6,<7".
"""
QUIET = ("ui-sans-serif", "system-ui", "sans-serif")  # Fonts of the reader's machine: nothing is fetched.


class Settings(DeviceOptions):
    """What is served, and where."""

    model: str = argument("MODEL", "shipped model, folder or hub id", "tiny-llava")
    host: str = option("127.0.0.1", "address to listen on", "ADDRESS")
    port: int = option(7860, "port, 0: a free one", ge=0, le=65535)
    new_tokens: int = option(64, "tokens of an answer at most", ge=1)
    frames: int = option(FRAMES, "evenly spaced frames of a video", ge=1)
    in_json: bool = as_json("print the address as one JSON object")


def run(asked: Settings) -> None:
    """Loads the model and serves until Ctrl-C."""
    if find_spec("gradio") is None:
        raise VtokenError('vtoken app needs gradio: pip install "gradio>=6,<7"')
    import gradio

    from vtoken.evals.pictures.asked import Answerer
    from vtoken.evals.shared.models import load_pair

    model, processor = load_pair(asked.model, asked.device, asked.dtype)
    served = page(asked.model, Answerer(model, processor, asked.new_tokens, asked.frames))
    try:
        _, address, _ = served.launch(
            server_name=asked.host,
            server_port=asked.port or None,
            prevent_thread_lock=True,
            quiet=True,
            theme=gradio.themes.Default(font=QUIET, font_mono=("ui-monospace", "monospace")),
        )
        print(json.dumps({"address": address}) if asked.in_json else f"serving {asked.model} on {address}", flush=True)
        served.block_thread()
    finally:
        served.close(verbose=False)


def page(name: str, answerer: Answerer) -> Any:
    """The page, as gradio's Blocks; its one call is named "answer"."""
    import gradio as gr

    from vtoken.evals import reference
    from vtoken.evals.shared.media import CONTAINERS

    methods = answerer.methods()
    videos, kinds = hasattr(answerer.processor, "video_token"), [*CONTAINERS, ".gif", ".webp"]
    shipped = reference.questions(18)[::6] if name in reference.names() else []

    def answered(*given: Any) -> tuple[Any, ...]:
        try:
            found = answerer(*given)
        except VtokenError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error
        return found.picture, found.dense, found.pruned, found.rows, found.aside

    with gr.Blocks(title=f"vtoken: {name}", analytics_enabled=False) as blocks:
        gr.Markdown(f"# {name}, dense and pruned")
        with gr.Row():
            with gr.Column():
                picture = gr.Image(type="pil", label="picture", sources=["upload", "clipboard"], height=320)
                hint = "or a video (MP4, WebM, GIF, ...)"
                video = gr.File(label=hint, file_types=kinds, height=160, visible=videos)
                question = gr.Textbox("Describe the image.", label="question")
                first = "fastervlm" if "fastervlm" in methods else methods[0]
                method = gr.Dropdown(methods, value=first, label="method")
                about = "tokens of the picture (64), a share (25%), {per_crop: 64}" + ", {per_frame: 16}" * videos
                budget = gr.Textbox("64", label="budget", info=about)
                go = gr.Button("Ask", variant="primary")
            with gr.Column():
                kept = gr.Image(label="kept tokens", format="png", height=380)
                dense, pruned = gr.Textbox(label="answer, dense"), gr.Textbox(label="answer, pruned")
                head = ["", "dense", "pruned"]
                table = gr.Dataframe(headers=head, label="one run each: vtoken bench measures", type="array")
                aside = gr.Markdown()
        given, shown = [picture, video, question, method, budget], [kept, dense, pruned, table, aside]
        go.click(answered, given, shown, api_name="answer", concurrency_limit=1)
        if shipped:
            gr.Examples([[str(q.image), q.question] for q in shipped], [picture, question], label="shipped questions")
    return blocks
