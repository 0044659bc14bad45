"""LaTeX of short final answers, without a computer algebra system: one spelling, plain values, and a quick proof of inequality.

Every function is pure, takes tens of microseconds on an ordinary answer, and raises on no text.
"""

from __future__ import annotations

import cmath
import math
import re
import zlib
from dataclasses import dataclass

from dfpo_core.rewards.answers import OTHER_VALUE, ascii_digits, canonical_number

_SYMBOLS = str.maketrans({"π": "\\pi ", "∞": "\\infty ", "×": "\\times ", "·": "\\cdot ", "≤": "\\le ", "≥": "\\ge ", "∪": "\\cup "})
_ROOT = re.compile(r"√(\d+|[A-Za-z])")
_DROPPED = re.compile(r"\\(?:left|right|[bB]igg?|displaystyle)(?![A-Za-z])|\\!|\\?\$|(?<!\\)\\[()\[\]]")
_SPACE = re.compile(r"(?:(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\s)+")
_TEXT = re.compile(r"\\(?:text|mbox|textbf|textit|textrm|mathrm)\s*\{([^{}]*)\}(\s*\^\s*\{?\d\}?)?")
_DEGREES_AND_PERCENT = re.compile(r"\s*(?:\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|°|\\?%)")
_FRACTION = re.compile(r"\\frac\s*(?:\{\s*([-+]?\d+)\s*\}|(\d))\s*(?:\{\s*([-+]?\d+)\s*\}|(\d))")
_PLAIN = re.compile(
    r"([-+]?)\s*"
    r"(?:(\d[\d,]*(?:\.\d+)?|\.\d+)|(?:(\d+)\s*)?\(([-+]?\d+)/([-+]?\d+)\)|(\d+)\s*/\s*(\d+))"  # 1,234.5  1(2/3)  2/3
    r"((?:\s+[A-Za-z]{2,}){0,3})"  # square feet
)
_NAME = re.compile(r"(?:m\s*)?(?:\\angle\s*)?\\?[A-Za-z]*(?:_\{?\w+\}?)?(?:\([A-Za-z]\))?")
_LONGEST_PLAIN = 5000  # characters
_SCIENTIFIC = re.compile(
    r"([-+]?)(\d)(?:\.(\d{1,100}))?(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?\s*([-+]?\d{1,3})\s*\}?|[eE]([-+]?\d{1,3}))"
)
_RELATION = re.compile(r"(<|>|\\(?:leqslant|geqslant|leq?|geq?|lt|gt)(?![A-Za-z]))")
_NOT_A_UNIT = OTHER_VALUE | {"and", "or", "if", "sin", "cos", "tan", "log", "ln", "exp", "sqrt", "over", "times", "mod"}


def tidy(text: str) -> str:
    """The same formula in LaTeX, without what only sets type: delimiters, \\left, thin spaces, surplus space, a full stop."""
    text = (
        _ROOT.sub(r"\\sqrt{\1}", ascii_digits(text))
        .translate(_SYMBOLS)
        .replace("bmatrix", "pmatrix")
        .replace("{,}", ",")
        .replace("\\dfrac", "\\frac")
        .replace("\\tfrac", "\\frac")
        .replace("\\cfrac", "\\frac")
    )
    text = _DROPPED.sub("", re.sub(r",\s*\\!\s*", ",", text))
    return _trimmed(_SPACE.sub(" ", text))


def spelling(text: str) -> str:
    r"""A tidied text without the spaces and braces that TeX does not need: \frac 12 and \frac{1}{2} are one, 4 2 and 42 are not."""
    return re.sub(r"\{(\w)\}", r"\1", re.sub(r"(?<!\d) | (?!\d)", "", text))


def decimal(text: str) -> str:
    """A tidied text in normalised scientific notation of a power of at least 3, 3.2\\times 10^{-5} or 3.2e-5, in decimal digits; any other
    text as it is: 4.2\\times 10^1 and 30\\times 10^5 are calculations."""
    match = _SCIENTIFIC.fullmatch(without_units(text))
    if not match:
        return text
    sign, digits, decimals, power = match[1], match[2], match[3] or "", int(match[4] or match[5])
    if not 3 <= abs(power) <= 100 or digits == "0":
        return text
    if power > 0:
        whole, rest = digits + decimals[:power].ljust(power, "0"), decimals[power:]
        return sign + whole + (f".{rest}" if rest else "")
    return f"{sign}0.{'0' * (-power - 1)}{digits}{decimals}"


def interval(text: str) -> str:
    """A tidied inequality in one letter as the interval that it describes, 1 \\le x < 3 as [1, 3); any other text as it is."""
    parts = _RELATION.split(text)
    sides, signs = [part.strip() for part in parts[::2]], parts[1::2]
    if not signs or len(signs) > 2 or not all(sides) or len({_is_below(sign) for sign in signs}) > 1:
        return text
    if not _is_below(signs[0]):
        sides, signs = sides[::-1], signs[::-1]
    middle = 1 if len(signs) == 2 else next((i for i, side in enumerate(sides) if re.fullmatch("[A-Za-z]", side)), None)
    if middle is None or not re.fullmatch("[A-Za-z]", sides[middle]):
        return text
    strict = [sign in ("<", ">", "\\lt", "\\gt") for sign in signs]
    low = ("(" if strict[0] else "[") + sides[0] if middle == 1 else "(-\\infty"
    high = sides[-1] + (")" if strict[-1] else "]") if middle < len(sides) - 1 else "\\infty)"
    return f"{low}, {high}"


def is_interval(text: str) -> bool:
    """Whether a tidied text can only be an interval: [1, 3), (2, \\infty); (1, 3) may be a point, [1, 3] a list."""
    ends = re.fullmatch(r"([\[(])([^,;\[\]]+),([^,;\[\]]+)([\])])", text.strip())
    return bool(ends) and ((ends[1] + ends[4]) in ("[)", "(]") or "\\infty" in ends[2] + ends[3])


def is_set(text: str) -> bool:
    r"""Whether a tidied text is a set of single values, \{1, 3\}."""
    return re.fullmatch(r"\\\{[^()\[\]{}]*\\\}", text.strip()) is not None


def is_tuple(text: str) -> bool:
    """Whether a tidied text is a point or an interval, (1, 3) or [1, 3)."""
    return re.fullmatch(r"[\[(][^()\[\]]*,[^()\[\]]*[\])]", text.strip()) is not None


def _is_below(sign: str) -> bool:
    return sign in ("<", "\\le", "\\leq", "\\lt", "\\leqslant")


def is_name(text: str) -> bool:
    """Whether a text is a name that a value can be given to: x, f(x), AB, \\theta, m\\angle A."""
    return _NAME.fullmatch(text.strip()) is not None


def without_units(text: str) -> str:
    """Without degrees, percent and `\\text{...}` that names a unit; text that holds a digit, or a word that is no unit, stays."""
    return _trimmed(_DEGREES_AND_PERCENT.sub("", _TEXT.sub(_unit, text)))


def _trimmed(text: str) -> str:
    return text.rstrip(" .,;").lstrip(" ")  # a point in front is a decimal point: .75


def _unit(match: re.Match[str]) -> str:
    words = re.findall(r"[^\W\d_]+", match[1])
    if any(character.isnumeric() for character in match[1]):
        return match[0] if match[2] or words else match[1]
    return match[0] if len(words) > 3 or _NOT_A_UNIT & {word.lower() for word in words} else " "


@dataclass(frozen=True)
class Plain:
    """A plain value: its canonical spelling, whether it was written as a fraction, and whether that is in lowest terms."""

    value: str
    is_fraction: bool = False
    is_reduced: bool = True

    @property
    def is_whole(self) -> bool:
        return self.value.removeprefix("-").isdigit()


def plain(text: str) -> Plain | None:
    """The plain value that a tidied text states: a decimal number, a fraction or a mixed number, after `x =` or `17 + 25 =`, with up
    to three words for a unit. None for everything that is left to be worked out, and for an equation such as `2x + 3 = 0`."""
    if len(text) > _LONGEST_PLAIN:
        return None
    *left, text = without_units(text).split("=")
    if not all(is_name(side) or not re.search(r"[A-Za-z,;]", re.sub(r"\\[A-Za-z]+", "", side)) for side in left):
        return None
    text = _FRACTION.sub(lambda match: f"({match[1] or match[2]}/{match[3] or match[4]})", _trimmed(text))
    while inner := re.fullmatch(r"\{([^=]*)\}|\(([^()/]*)\)", text):
        text = (inner[1] or inner[2] or "").strip()
    match = _PLAIN.fullmatch(text)
    if not match or _NOT_A_UNIT & {word.lower() for word in match[8].split()}:
        return None
    sign, number, whole = match[1], match[2], match[3] or "0"
    if number:
        value = canonical_number(sign + number)
        return Plain(value) if value is not None else None
    top, bottom = match[4] or match[6], match[5] or match[7]
    if max(map(len, (whole, top, bottom))) > 100 or int(bottom) == 0 or (match[3] and top[0] in "-+"):
        return None
    top, bottom = int(top) * (1 if int(bottom) > 0 else -1), abs(int(bottom))
    numerator = int(whole) * bottom + top
    value = canonical_number(f"{-numerator if sign == '-' else numerator}/{bottom}")
    return Plain(value, is_fraction=True, is_reduced=math.gcd(top, bottom) == 1) if value is not None else None


# A quick proof that two formulas differ: their values where every letter stands for a fixed number.

_TOKEN = re.compile(r"\s*(\d+(?:\.\d+)?|\.\d+|\\[A-Za-z]+|\\[{}]|[A-Za-z]|[-+*/^_(){}\[\],!])")
_NO_VALUE = re.compile(r"\\cup(?![A-Za-z])|\\begin|\\pm(?![A-Za-z])|[=<>]|\\(?:leq?|geq?|neq?|in)(?![A-Za-z])")
_MATRIX = re.compile(r"\\(?:begin|end)\s*\{[pb]matrix\}")
_LETTERS = {"\\pi": cmath.pi, "e": cmath.e, "i": 1j, "\\infty": 1e100}
_MULTIPLY = {"*", "\\cdot", "\\times"}
_GREEK = {f"\\{name}" for name in ["alpha", "beta", "gamma", "delta", "theta", "phi", "lambda", "mu", "omega", "sigma", "rho"]}
_LONGEST_FORMULA = 300  # characters; also bounds the depth of the recursion


def different(first: str, second: str) -> bool:
    r"""Whether two tidied formulas, or lists of formulas, certainly have different values. False also means: not known.

    Letters get fixed values between 1 and 2, so equal formulas agree; lists (also points, intervals and matrices) must agree as sets.
    A single value is no union, matrix or pair of solutions, and no equation or inequality but one that names it (y = ...).
    """
    name, equals, rest = first.partition("=")
    if equals and is_name(name) and "=" not in second + rest:
        first = rest
    one, other = _values(first), _values(second)
    if one is None or other is None:
        value, formula = (one, second) if other is None else (other, first)
        return value is not None and len(value) == 1 and _NO_VALUE.search(formula) is not None
    return not (all(_is_in(value, other) for value in one) and all(_is_in(value, one) for value in other))


def _is_in(value: complex, values: list[complex]) -> bool:
    return any(abs(value - other) <= 1e-6 * max(abs(value), abs(other)) for other in values)


def _values(text: str) -> list[complex] | None:
    """The values in a formula or a bracketed list of them; None for what this small grammar does not know."""
    if len(text) > _LONGEST_FORMULA or re.search(r"\d,\d{3}(?!\d)|\d\s*\\frac|\\cup|\|", text):
        return None  # 1,234 and 1\frac{1}{2} can be read in two ways
    tokens, position = [], 0
    text = without_units(_MATRIX.sub(lambda match: "(" if "begin" in match[0] else ")", text))
    text = text.replace("\\\\", ",").replace("&", ",")
    while position < len(text.rstrip()):
        match = _TOKEN.match(text, position)
        if not match:
            return None
        tokens.append(match[1])
        position = match.end()
    if tokens and tokens[0] in ("(", "[", "\\{") and "," in tokens and tokens[-1] in (")", "]", "\\}"):
        tokens = tokens[1:-1]
    try:
        return _Reader(tokens).list()
    except (_Unknown, ArithmeticError, ValueError):
        return None


class _Unknown(Exception):
    """The formula is none that the grammar knows."""


class _Reader:
    """Recursive descent over tokens: list, sum, product, power, atom; each method reads one and returns its value."""

    def __init__(self, tokens: list[str]):
        self.tokens, self.position = [*tokens, ""], 0

    @property
    def token(self) -> str:
        return self.tokens[self.position]

    def take(self, *expected: str) -> str:
        token = self.token
        if expected and token not in expected:
            raise _Unknown(token)
        self.position += 1
        return token

    def list(self) -> list[complex]:
        values = [self.sum()]
        while self.token:
            self.take(",")
            values.append(self.sum())
        if not all(cmath.isfinite(value) for value in values):
            raise _Unknown("infinite")
        return values

    def sum(self) -> complex:
        sign = -1 if self.token in "+-" and self.token and self.take() == "-" else 1
        value = sign * self.product()
        while self.token in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        return value

    def product(self) -> complex:
        value = self.power()
        while True:
            if self.token in _MULTIPLY:
                self.take()
                value *= self.power()
            elif self.token == "/":
                self.take()
                value /= self.power()
            elif self.token in ("(", "{") or self.token[:1].isalnum() or self.token[:1] == "\\":
                value *= self.power()
            else:
                return value

    def power(self) -> complex:
        base = self.atom()
        if self.token != "^":
            return base
        self.take()
        exponent = self.argument()
        if self.token in ("^", "!") or (base.real <= 0 and exponent != int(exponent.real)):
            raise _Unknown("power")  # roots of negative numbers have no one value
        return base**exponent

    def atom(self) -> complex:
        token = self.take()
        if token[:1].isdigit() or token[:1] == ".":
            if self.token in ("_", "!"):
                raise _Unknown("base or factorial")
            return complex(float(token))
        if token in ("(", "{"):
            value = self.sum()
            self.take(")" if token == "(" else "}")
            return value
        if token == "\\frac":
            return self.argument() / self.argument()
        if token == "\\sqrt":
            return self.root()
        if token in _GREEK or token in _LETTERS or (len(token) == 1 and token.isalpha()):
            return self.letter(token)
        raise _Unknown(token)

    def argument(self) -> complex:
        """What a command or `^` applies to: a group, a letter or one digit, so that \\frac12 is a half."""
        token = self.token
        if len(token) > 1 and token.isdigit():
            self.tokens[self.position] = token[1:]
            return complex(float(token[0]))
        if token[:1] in ("-", "+", "(", "["):
            raise _Unknown(token)
        return self.atom()

    def root(self) -> complex:
        degree = complex(2)
        if self.token == "[":
            self.take()
            degree = self.sum()
            self.take("]")
        radicand = self.argument()
        if radicand.imag or radicand.real < 0:
            raise _Unknown("root")
        return radicand ** (1 / degree)

    def letter(self, token: str) -> complex:
        name = token
        if self.token == "_":
            name += self.take() + (self.take("{") + self.take() + self.take("}") if self.token == "{" else self.take())
        return complex(_LETTERS.get(name) or 1 + zlib.crc32(name.encode()) / 2**32)
