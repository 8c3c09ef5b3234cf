"""Questions before something is done, and the help."""

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Label, OptionList, Static
from textual.widgets.option_list import Option

from meshd.bounds import printable


class Confirm(ModalScreen[bool]):
    """Asks whether to do something that can't be undone. The answer is no unless the user says yes."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,n", "answer(False)", "No"),
        Binding("y", "answer(True)", "Yes"),
        Binding("left,right,up,down", "app.focus_next", show=False),
    ]

    def __init__(self, question: str) -> None:
        super().__init__()
        self._question = question

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Label(Text(printable(self._question)))
            with Horizontal():
                yield Button("No (n)", id="no", variant="primary")
                yield Button("Yes (y)", id="yes", variant="error")

    def on_button_pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")

    def action_answer(self, answer: bool) -> None:
        self.dismiss(answer)


class Choose(ModalScreen[str | None]):
    """Asks for one of several things, or, with a `placeholder`, for anything that is typed. None: the user does not want to."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "cancel", "Cancel")]

    def __init__(self, question: str, options: Sequence[tuple[str, str]], placeholder: str = "") -> None:
        """`options`: values, and how each is shown."""
        super().__init__()
        self._question, self._options, self._placeholder = question, options, placeholder

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Label(Text(printable(self._question)))
            if self._placeholder:
                yield Input(placeholder=self._placeholder)
            yield OptionList(*[Option(Text(printable(shown))) for _, shown in self._options])

    def on_mount(self) -> None:
        choices = self.query_one(OptionList)
        choices.display = bool(self._options)
        choices.highlighted = 0 if self._options else None
        if not self._placeholder:
            choices.focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.dismiss(event.value.strip() or None)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(self._options[event.option_index][0])

    def action_cancel(self) -> None:
        self.dismiss(None)


class Help(ModalScreen[None]):
    """Lists all keys."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,question_mark,q", "close", "Close")]

    def __init__(self, keys: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> None:
        """`keys`: for each screen its name, and its keys with what they do."""
        super().__init__()
        self._keys = keys

    def compose(self) -> ComposeResult:
        text = Text()
        for name, keys in self._keys:
            text.append(f"{name}\n", "bold")
            for key, does in keys:
                text.append(f"  {key:14}{does}\n")
            text.append("\n")
        text.append("In every table: arrows, page up and down, enter, and the mouse.")
        with VerticalScroll(classes="dialog help"):
            yield Static(text)

    def action_close(self) -> None:
        self.dismiss(None)
