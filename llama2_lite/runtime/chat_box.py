"""A chat in a notebook: the same conversation as `llama2-lite chat`, with a mouse."""

import html
from typing import Any

import ipywidgets as widgets

from llama2_lite.runtime.talk import Conversation

STYLES = {"system": "color:#888", "user": "font-weight:600", "assistant": ""}


class ChatBox:
    """What has been said, a line to type into, and a system message to set.

    The answer appears as it is drawn. ``view`` is the widget to show.

    Args:
        conversation: with the model.
    """

    def __init__(self, conversation: Conversation):
        self.conversation = conversation
        self.notice = ""
        wide = widgets.Layout(width="100%")
        self.said = widgets.HTML(layout=widgets.Layout(min_height="6em"))
        self.text = widgets.Text(placeholder="say something", layout=wide)
        self.send = widgets.Button(description="send", button_style="primary")
        self.system = widgets.Text(
            placeholder="what holds for the whole dialogue", layout=wide
        )
        self.begin = widgets.Button(description="begin anew")
        self.send.on_click(self._send)
        self.begin.on_click(self._begin)
        # what the browser reports when Enter is pressed
        self.text.on_msg(self._entered)
        self.view = widgets.VBox(
            [
                widgets.HBox([self.system, self.begin]),
                self.said,
                widgets.HBox([self.text, self.send]),
            ]
        )
        self._show()

    def _entered(self, _: Any, content: dict[str, Any], __: Any) -> None:
        if content.get("event") == "submit":
            self._send()

    def _send(self, _: Any = None) -> None:
        text, self.notice = self.text.value.strip(), ""
        if not text:
            return
        self.text.value = ""
        self.send.disabled = self.begin.disabled = True
        dialog, answer = list(self.conversation.dialog), ""
        try:
            for piece in self.conversation.reply(text):
                answer += piece
                self._show(
                    [
                        *dialog,
                        {"role": "user", "content": text},
                        {"role": "assistant", "content": answer},
                    ]
                )
            if not answer:
                self.notice = "no answer"
        except ValueError as error:
            self.notice = str(error)
        finally:
            self.send.disabled = self.begin.disabled = False
            self._show()

    def _begin(self, _: Any = None) -> None:
        self.notice = ""
        try:
            self.conversation.begin(self.system.value)
        except ValueError as error:
            self.notice = str(error)
        self._show()

    def _show(self, dialog: list[dict[str, str]] | None = None) -> None:
        shown = self.conversation.dialog if dialog is None else dialog
        lines = [
            f'<p style="margin:0.2em;{STYLES[message["role"]]}">'
            f"{html.escape(message['content'])}</p>"
            for message in shown
        ]
        if self.notice:
            lines.append(f"<p><em>[{html.escape(self.notice)}]</em></p>")
        self.said.value = "".join(lines)
