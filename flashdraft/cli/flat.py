"""From a command's function to what typer wants to see: one parameter an option.

A parameter that is a dataclass stands for its fields: every default and help text exists once,
beside its field. A field without metadata stays at its default; a tuple becomes an option that may
be given several times; an underscore at the end keeps a field's name apart from a word of Python.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Annotated, Any, get_args, get_origin

import typer

from flashdraft.types import Allowed, check_option, check_options, kind_of

__all__ = ["flat"]

Values = dict[str, Any]  # what typer read, by parameter


def flat(function: Callable[..., None]) -> Callable[..., None]:
    """The function with the fields of its dataclass parameters in their place."""
    groups: dict[str, type[Any]] = {}
    single: list[inspect.Parameter] = []  # that belong to no group
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        kind = parameter.annotation
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            groups[parameter.name] = kind
            parameters.extend(_fields(kind))
        else:
            single.append(parameter)
            parameters.append(parameter)

    def call(**values: Any) -> None:
        for parameter in single:
            _check_single(parameter, values[parameter.name])
        for name, group in groups.items():
            values[name] = _taken(group, values)
            check_options(values[name])
        function(**values)

    keywords = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    call.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    call.__annotations__ = {one.name: one.annotation for one in parameters}
    return call


def _taken(group: type[Any], values: Values) -> Any:
    """An object of the dataclass from its fields' values, which go out of `values`."""
    own = {}
    for field in dataclasses.fields(group):
        if field.metadata:
            own[field.name] = values.pop(field.name)
    return group(**own)


def _check_single(parameter: inspect.Parameter, value: Any) -> None:
    """An option that is no field of a dataclass has its `Allowed` beside its `Option`."""
    if get_origin(parameter.annotation) is not Annotated or value is None:
        return
    hint, *extras = get_args(parameter.annotation)
    allowed = next((extra for extra in extras if isinstance(extra, Allowed)), None)
    several = value if isinstance(value, list) else [value]
    for one in several:
        check_option(parameter.name, one, kind_of(hint), allowed)


def _fields(group: type[Any]) -> Iterator[inspect.Parameter]:
    parameters = inspect.signature(group, eval_str=True).parameters
    for field in dataclasses.fields(group):
        if not field.metadata:
            continue
        parameter = parameters[field.name]
        hint = parameter.annotation
        default = parameter.default
        if get_origin(hint) is tuple:
            item = get_args(hint)[0]
            hint = list[item]  # type: ignore[valid-type]
            default = list(default)
        name = f"--{field.name.rstrip('_').replace('_', '-')}"
        option = typer.Option(name, help=field.metadata["help"])
        yield parameter.replace(default=default, annotation=Annotated[hint, option])
