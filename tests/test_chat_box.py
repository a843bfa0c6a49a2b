"""The chat in a notebook, driven as a browser drives it: by messages to a kernel."""

from itertools import pairwise
from pathlib import Path
from queue import Empty

import pytest
import torch
from jupyter_client.manager import start_new_kernel

from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.runtime.chat_box import ChatBox
from llama2_lite.runtime.talk import Conversation, open_model
from llama2_lite.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "chat"
    texts = [
        f"{i} and {j} make {i + j}. <b>Yes</b>\n" for i in range(9) for j in range(9)
    ]
    folder.mkdir()
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", 300)
    torch.manual_seed(0)
    config = LlamaConfig(16, 1, 2, 2, 300, 32, max_seq_len=64)
    Llama(config).save_pretrained(folder, tokenizer, force=True)
    return folder


@pytest.fixture
def box(folder: Path) -> ChatBox:
    return ChatBox(Conversation(*open_model(folder), max_new_tokens=6, seed=2))


def test_a_dialogue_goes_on_and_begins_anew(box):
    box.text.value = "Who is <b>Tom</b>?"
    box.send.click()
    assert box.text.value == ""
    assert "Who is &lt;b&gt;Tom&lt;/b&gt;?" in box.said.value
    roles = [message["role"] for message in box.conversation.dialog]
    assert roles == ["user", "assistant"]
    assert not box.send.disabled
    box.system.value = "Be kind."
    box.begin.click()
    assert box.conversation.dialog == [{"role": "system", "content": "Be kind."}]
    assert "Be kind." in box.said.value
    assert "Tom" not in box.said.value
    box.send.click()  # nothing to send
    assert len(box.conversation.dialog) == 1


def test_what_is_refused_is_said_and_changes_nothing(box):
    box.text.value = "Hi"
    box.send.click()
    before = list(box.conversation.dialog)
    for text, reason in (("[INST] x", "contains [INST]"), ("Hi " * 60, "no room")):
        box.text.value = text
        box.send.click()
        assert reason in box.said.value
        assert box.conversation.dialog == before
    box.system.value = "<<SYS>>"
    box.begin.click()
    assert "contains &lt;&lt;SYS&gt;&gt;" in box.said.value
    assert box.conversation.dialog == before
    box.text.value = "And?"
    box.send.click()
    assert "contains" not in box.said.value


def test_a_browser_sees_the_answer_grow(folder):
    code = f"""
from IPython.display import display
from llama2_lite.runtime.chat_box import ChatBox
from llama2_lite.runtime.talk import Conversation, open_model
box = ChatBox(Conversation(*open_model({str(folder)!r}), max_new_tokens=12, seed=4))
display(box.view)
print(box.text.model_id, box.said.model_id, box.send.model_id)
"""
    manager, client = start_new_kernel()
    try:
        names: list[str] = []

        def printed(message):
            if message["msg_type"] == "stream":
                names.extend(message["content"]["text"].split())

        client.execute_interactive(code, timeout=60, output_hook=printed)
        text, said, send = names

        def tell(comm: str, data: dict) -> None:
            message = client.session.msg("comm_msg", {"comm_id": comm, "data": data})
            client.shell_channel.send(message)

        tell(text, {"method": "update", "state": {"value": "Who?"}, "buffer_paths": []})
        tell(text, {"method": "custom", "content": {"event": "submit"}})
        shown = follow(client, said, send)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert len(shown) > 3
    assert "Who?" in shown[0]
    for shorter, longer in pairwise(shown):
        assert longer.startswith(shorter.removesuffix("</p>").rstrip())
    conversation = Conversation(*open_model(folder), max_new_tokens=12, seed=4)
    assert "".join(conversation.reply("Who?")).strip()[:4] in shown[-1]


def follow(client, said: str, send: str) -> list[str]:
    """What the browser is told to show, until it may send again."""
    shown: list[str] = []
    while True:
        try:
            message = client.get_iopub_msg(timeout=30)
        except Empty:
            pytest.fail(f"the answer stopped after {shown}")
        if message["msg_type"] != "comm_msg":
            continue
        content = message["content"]
        state = content["data"].get("state", {})
        if content["comm_id"] == said and "value" in state:
            shown.append(state["value"])
        if content["comm_id"] == send and state.get("disabled") is False:
            return shown
