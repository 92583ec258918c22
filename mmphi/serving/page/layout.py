"""Layout of the page and actions of its buttons."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Set before the import: gradio must not send telemetry.

import gradio as gr

from mmphi.errors import MmphiError
from mmphi.generation.sampling import SamplingParams
from mmphi.serving.page.examples import Example
from mmphi.serving.page.model_pool import ModelPool, PageConversation, PageTurn

ALONE = ""
NO_SECOND = ("(no second model)", ALONE)
PURPOSE = "Ask a trained multimodal model about an image or a recording, or compare the answers of two models."
KEPT_S, LOOK_S = 24 * 3600, 3600  # Seconds that uploaded files are kept, and between checks for older ones.
# System fonts: those of gradio's own themes are loaded from other hosts.
FONT = ["system-ui", "sans-serif"]
MONO = ["ui-monospace", "monospace"]
CSS = '[aria-label="Share"] {display: none}'  # The button would upload the conversation to a site of gradio's makers.

Choice = tuple[str, str]  # Label and name of a model.
Shown = list[dict[str, Any]]


@dataclass(frozen=True)
class PageConfig:
    """Contents of the page.

    Attributes:
        models: Returns the models to choose from; called whenever the page is opened.
        model: Name of the model that is selected initially.
        second_model: Name of the second model that is selected initially; empty for none.
        examples: Examples to click on.
        sampling: Initial sampling parameters.
        questions: Returns the questions that a model was trained on, by its name.
    """

    models: Callable[[], Sequence[Choice]]
    model: str
    second_model: str = ALONE
    examples: Sequence[Example] = ()
    sampling: SamplingParams = field(default_factory=SamplingParams)
    questions: Callable[[str], Sequence[str]] = lambda _: ()


def _trained_on(questions: Sequence[str]) -> str:
    """A model's training questions, as Markdown."""
    listed = " · ".join(f"*{question}*" for question in questions)
    return f"The selected model was trained on questions such as: {listed}" if listed else ""


def shown(talk: PageConversation) -> Shown:
    """A conversation in the format of gradio's chatbot."""
    messages: Shown = []
    for turn in talk.turns:
        parts: list[Any] = [{"path": path} for path in (turn.image, turn.audio) if path]
        if turn.text.strip():
            parts.append(turn.text)
        if turn.audio and (turn.transcript or turn.done):
            parts.append(f"transcript: {turn.transcript or '(no speech)'}")
        messages.append({"role": "user", "content": parts})
        if turn.answer or turn.done or turn.problem:
            content = turn.answer + (f"\n\n⚠ {turn.problem}" if turn.problem else "")
            messages.append({"role": "assistant", "content": content.strip() or "(empty answer)"})
    return messages


def _check_done(talks: Sequence[PageConversation]) -> None:
    if any(talk.answering for talk in talks):
        raise gr.Error("The model is still answering: wait, or press Stop.", print_exception=False)


def _sampling(max_tokens: float, temperature: float, top_p: float, seed: float | None) -> SamplingParams:
    try:
        return SamplingParams(int(max_tokens), temperature, top_p, None if seed is None else int(seed))
    except MmphiError as error:
        raise gr.Error(str(error), print_exception=False) from error


def build_page(pool: ModelPool, look: PageConfig) -> gr.Blocks:
    """Build the page.

    Args:
        pool: Models that answer.
        look: Contents of the page.
    """
    names: dict[str, str] = {}

    def listed() -> list[Choice]:
        found = list(look.models())
        names.update({value: label for label, value in found})
        return found

    def opened() -> list[Any]:
        found = listed()
        return [gr.update(choices=found), gr.update(choices=[NO_SECOND, *found])]

    def views(talks: list[PageConversation]) -> list[Any]:
        second = talks[1] if len(talks) > 1 else None
        own = [gr.update(value=shown(talks[0]), label=names.get(talks[0].model, talks[0].model))]
        if second is None:
            return [*own, gr.update(value=[], visible=False), talks]
        return [*own, gr.update(value=shown(second), label=names.get(second.model, second.model), visible=True), talks]

    def chosen(model: str, second_model: str, talks: list[PageConversation], who: gr.Request) -> list[Any]:
        for talk in talks:
            talk.left = True
        pool.stop(str(who.session_hash))
        return [
            *views([PageConversation(name) for name in (model, second_model) if name]),
            _trained_on(look.questions(model)),
        ]

    def answered(
        talks: list[PageConversation], who: gr.Request, system: str, how: SamplingParams
    ) -> Iterator[list[Any]]:
        for _ in pool.ask(str(who.session_hash), talks, system.strip(), how):
            if any(talk.left for talk in talks):  # The browser's cancellation may arrive later.
                # Gradio sends the last output again when this ends; it must not restore the cleared conversation.
                yield [gr.skip(), gr.skip(), gr.skip()]
                return
            yield views(talks)

    def send(
        text: str,
        image: str | None,
        audio: str | None,
        talks: list[PageConversation],
        who: gr.Request,
        system: str,
        *how: Any,
    ) -> Iterator[list[Any]]:
        if not (text.strip() or image or audio):
            raise gr.Error("Nothing to send: type a question, record one, or add an image.", print_exception=False)
        _check_done(talks)
        sampling = _sampling(*how)
        for talk in talks:
            talk.turns.append(PageTurn(text, image or "", audio or ""))
        for update in answered(talks, who, system, sampling):
            cleared = any(talk.left for talk in talks)
            yield [*([gr.skip()] * 3 if cleared else ["", None, None]), *update]

    def again(talks: list[PageConversation], who: gr.Request, system: str, *how: Any) -> Iterator[list[Any]]:
        if not talks[0].turns:
            raise gr.Error("There is no question to repeat yet.", print_exception=False)
        _check_done(talks)
        sampling = _sampling(*how)
        for talk in talks:
            talk.turns[-1] = talk.turns[-1].anew()
        yield from answered(talks, who, system, sampling)

    def stop(who: gr.Request) -> None:
        pool.stop(str(who.session_hash))

    with gr.Blocks(title="mmphi", analytics_enabled=False, fill_height=True, delete_cache=(LOOK_S, KEPT_S)) as page:
        gr.Markdown(f"# mmphi\n{PURPOSE}")
        talks = gr.State([PageConversation(name) for name in (look.model, look.second_model) if name])
        found = listed()
        with gr.Row():
            model = gr.Dropdown(found, value=look.model, label="Model", elem_id="model")
            second_model = gr.Dropdown(
                [NO_SECOND, *found], value=look.second_model, label="Compare with", elem_id="beside"
            )
        trained_on = gr.Markdown(_trained_on(look.questions(look.model)), elem_id="trained-on")
        with gr.Row():
            common: dict[str, Any] = {"height": 380, "buttons": ["copy"], "feedback_options": None}
            first = gr.Chatbot(label=names.get(look.model, look.model), elem_id="first", **common)
            second = gr.Chatbot(
                label=names.get(look.second_model, look.second_model),
                elem_id="second",
                visible=bool(look.second_model),
                **common,
            )
        with gr.Row():
            image = gr.Image(
                label="Image",
                sources=["upload", "webcam", "clipboard"],
                type="filepath",
                image_mode=None,
                height=220,
                elem_id="image",
            )
            audio = gr.Audio(label="Recording", sources=["microphone", "upload"], type="filepath", elem_id="audio")
            with gr.Column(scale=2):
                text = gr.Textbox(
                    label="Question",
                    placeholder="Type a question, or record one and leave this empty",
                    lines=1,
                    max_lines=6,
                    elem_id="text",
                )
                with gr.Row():
                    asking = gr.Button("Send", variant="primary", elem_id="send", min_width=80)
                    stopping = gr.Button("Stop", elem_id="stop", min_width=80)
                    repeating = gr.Button("Retry", elem_id="retry", min_width=80)
                    clearing = gr.Button("Clear", elem_id="clear", min_width=80)
        with gr.Accordion("Generation settings", open=False):
            system = gr.Textbox("", label="System prompt", lines=1)
            with gr.Row():
                max_tokens = gr.Slider(1, 1024, look.sampling.max_tokens, step=1, label="Longest answer (tokens)")
                temperature = gr.Slider(
                    0, 2, look.sampling.temperature, step=0.05, label="Temperature", info="0: the likeliest token"
                )
                top_p = gr.Slider(0.05, 1, look.sampling.top_p, step=0.05, label="Top-p", elem_id="top_p")
                seed = gr.Number(look.sampling.seed, precision=0, label="Seed", info="empty: a new one for each answer")
        if look.examples:
            examples = gr.Examples(
                list(look.examples), [text, image, audio], label="Examples (a click sends one)", examples_per_page=8
            )

        how = [system, max_tokens, temperature, top_p, seed]
        seen = [first, second, talks]
        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        many: dict[str, Any] = quiet | {"concurrency_limit": None}
        question_inputs = [text, image, audio]
        if look.examples:
            # Loading an example fills the fields; the next event sends them.
            asking_for_example = examples.load_input_event.then(
                send, [*question_inputs, talks, *how], [*question_inputs, *seen], **many
            )
        answers = [
            *([asking_for_example] if look.examples else []),
            gr.on(
                [asking.click, text.submit], send, [*question_inputs, talks, *how], [*question_inputs, *seen], **many
            ),
            repeating.click(again, [talks, *how], seen, **many),
        ]
        stopping.click(stop, None, None, queue=False, **quiet)
        restarts = [model.change, second_model.change, clearing.click]
        gr.on(restarts, chosen, [model, second_model, talks], [*seen, trained_on], cancels=answers, **quiet)
        page.load(opened, None, [model, second_model], **quiet)
        page.unload(stop)
    made: gr.Blocks = page
    return made


def theme() -> gr.Theme:
    """Theme of the page, which loads nothing from other hosts."""
    return gr.themes.Soft(font=FONT, font_mono=MONO)
