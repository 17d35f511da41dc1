"""The words of both notations: functions, LaTeX commands, constructors, units, and words that are
no unit.

Tables only. A name that is in none of them is a letter, an unknown unit or a parse error, and is
never looked up anywhere else.
"""

from __future__ import annotations

from verifier.answer_tree import INFINITY, REALS, Constant, Label, Node, Sequence


def words(text: str) -> frozenset[str]:
    """The words of a text, as a table to look names up in."""
    return frozenset(text.split())


FUNCTIONS = {
    **{name: name for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{name: name for name in ("sinh", "cosh", "tanh", "coth", "sech", "csch")},
    **{
        spelling + name: "a" + name
        for spelling in ("arc", "a", "ar")
        for name in ("sin", "cos", "tan", "cot", "sec", "csc", "sinh", "cosh", "tanh")
        if spelling != "ar" or name.endswith("h")
    },
    **{name: name for name in ("exp", "gcd", "lcm", "conjugate", "gamma", "sign", "re", "im")},
    **{name: name for name in ("ln", "log", "log10", "log2", "sqrt", "cbrt", "root", "abs")},
    **{name: name for name in ("floor", "ceil", "factorial", "factorial2", "binomial")},
    **{name: name for name in ("max", "min", "det", "pow")},
    "lg": "log10",
    "Abs": "abs",
    "fabs": "abs",
    "ceiling": "ceil",
    "binom": "binomial",
    "comb": "binomial",
    "Max": "max",
    "Min": "min",
    "Mod": "mod",
    "cosec": "csc",
    "tg": "tan",
    "ctg": "cot",
}
TRIGONOMETRIC = words("sin cos tan cot sec csc sinh cosh tanh")
ARITIES = {
    **dict.fromkeys(("gcd", "lcm"), (2, 99)),
    **dict.fromkeys(("max", "min"), (1, 99)),
    **dict.fromkeys(("binomial", "mod", "pow", "root"), (2, 2)),
    "log": (1, 2),
}
CARVED_FUNCTIONS = (
    *("arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "sqrt"),
    *("sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "pi"),
)
"""Longer names first, because the first that fits is taken."""
CALL_ONLY = words(
    "gamma re im sign root conjugate pow max min det gcd lcm comb Max Min Mod exp abs Abs floor "
    "ceil ceiling factorial factorial2 binomial"
)
CONSTRUCTORS = words(
    "Fraction Rational Integer Float Decimal mpf complex Matrix ImmutableMatrix "
    "MutableDenseMatrix ImmutableDenseMatrix array Interval Intervalopen IntervalLopen "
    "IntervalRopen Union Intersection Complement "
    "FiniteSet set frozenset Tuple Point Point2D Point3D Eq Ne Lt Le Gt Ge"
)
CONSTANTS = {
    "pi": Constant("pi"),
    **dict.fromkeys(("oo", "inf", "infty", "infinity", "Infinity"), INFINITY),
    **{letter: Constant(letter.lower()) for letter in "EeIi"},
}
GREEK = words(
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell"
)
VARIANTS = {
    **{"varepsilon": "epsilon", "vartheta": "theta", "varphi": "phi", "varrho": "rho"},
    "ell": "l",
}
LATEX_OPERATORS = {
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "pm": "±", "mp": "∓", "le": "<=",
    "leq": "<=", "leqslant": "<=", "leqq": "<=", "lt": "<", "ge": ">=", "geq": ">=",
    "geqslant": ">=", "geqq": ">=", "gt": ">", "ne": "!=", "neq": "!=", "in": "in", "cup": "∪",
    "cap": "∩", "setminus": "∖", "backslash": "∖", "approx": "≈", "simeq": "≈", "approxeq": "≈",
    "doteq": "≈", "equiv": "=",
    "mid": "|", "colon": ":", "lor": "or", "vee": "or", "land": "and", "wedge": "and", "prime": "'",
    "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]", "langle": "⟨", "rangle": "⟩",
    "lvert": "lbar", "rvert": "rbar", "vert": "|", "lfloor": "⌊", "rfloor": "⌋", "lceil": "⌈",
    "rceil": "⌉", "circ": "°", "degree": "°", "percent": "%", "to": "→", "euro": "€",
    "pounds": "£", "textdollar": "$", "yen": "¥", "lVert": "lbar",
    "rVert": "rbar", "Vert": "|",
}  # fmt: skip
LATEX_IGNORED = words(
    "left right middle big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr displaystyle textstyle "
    "scriptstyle limits nolimits quad qquad rm bf it sf tt boldmath hline thinspace medspace "
    "negthinspace nobreak break newline allowbreak mathsurround notag nonumber hfill boxed fbox"
)
LATEX_TEXT = words(
    "text mathrm textrm textbf textit mathbf mathit mathsf textsf mbox hbox operatorname "
    "textnormal mathtt texttt boldsymbol emph rm underline mathnormal pmb bm textsc mathop"
)
LATEX_ACCENTS = words("vec overrightarrow hat widehat bar tilde widetilde mathcal mathfrak")
LATEX_ATOMS = words(
    "frac dfrac tfrac cfrac sqrt binom dbinom tbinom begin end mathbb overline sum prod infty pi "
    "emptyset varnothing hspace phantom pmod dot mathbf sin R Re Im lg cosec arccot "
    "arcsec arccsc arsinh arcosh artanh stackrel overset underset forall exists ldots dots cdots "
    "int lim iff implies Rightarrow Leftrightarrow rightarrow equiv sim perp parallel angle "
    "triangle measuredangle Pr subset subseteq notin nabla partial oplus otimes bmod mod gcd max "
    "min det exp tan cos"
)
_NOT_COMMANDS = words("re im sign root pow tg lg binomial comb abs floor ceil sqrt cbrt")
"""Functions whose names, behind a backslash, mean nothing or stand in another table."""
LATEX_KNOWN = (
    set(LATEX_OPERATORS)
    | LATEX_IGNORED
    | LATEX_TEXT
    | LATEX_ACCENTS
    | LATEX_ATOMS
    | GREEK
    | set(VARIANTS)
) | {name for name in FUNCTIONS if name.islower() and name not in _NOT_COMMANDS}
COMMAND_TOKENS = {
    **{name: ("function", name) for name in FUNCTIONS if name not in ("sqrt", "binom")},
    **{name: ("function", name.lower()) for name in ("Re", "Im")},
    **{"R": ("set", "R"), "emptyset": ("set", "empty"), "varnothing": ("set", "empty")},
    **{name: ("symbol", VARIANTS.get(name, name)) for name in (*GREEK, *VARIANTS)},
    **{name: ("constant", name) for name in ("pi", "infty")},
    **{name: ("operator", value) for name, value in LATEX_OPERATORS.items()},
    **{"Pr": ("symbol", "P"), "measuredangle": ("command", "angle")},
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), ("command", "frac")),
    **dict.fromkeys(("dbinom", "tbinom"), ("command", "binom")),
}
"""Kind and value of the token that a LaTeX command stands for, where it stands for one alone."""
NUMBER_SETS: dict[str, Node] = {
    "R": REALS,
    "Z": Label("integers"),
    "Q": Label("rationals"),
    "N": Label("naturals"),
    "C": Label("complexes"),
}
EMPTY_SET = Sequence("set", ())

UNIT_NAMES = {
    "cm": "cm centimeter centimetre", "m": "m meter metre", "mm": "mm millimeter millimetre",
    "km": "km kilometer kilometre", "in": "in inch inches", "ft": "ft foot feet",
    "yd": "yd yds yard", "mi": "mi mile", "s": "s sec secs second", "min": "min mins minute",
    "h": "h hr hrs hour", "day": "day", "week": "week wk wks", "month": "month",
    "year": "year yr yrs", "g": "g gram gm", "kg": "kg kilogram kgs", "mg": "mg milligram",
    "lb": "lb lbs pound", "oz": "oz ounce", "l": "l L liter litre", "ml": "ml mL milliliter",
    "gal": "gal gallon", "dollar": "dollar dollars usd USD bucks", "cent": "cent ¢",
    "euro": "euro EUR", "degree": "degree deg", "radian": "radian rad", "n": "N newton",
    "j": "J joule", "w": "W watt", "hz": "Hz hertz", "mph": "mph", "unit": "unit",
    "percent": "percent", "people": "people person persons", "kmh": "kmh kph", "c": "C celsius",
    "f": "F fahrenheit",
}  # fmt: skip
SPEEDS = {"mph": {"mi": 1, "h": -1}, "kmh": {"km": 1, "h": -1}}
UNIT_OF = {word: unit for unit, words in UNIT_NAMES.items() for word in words.split()}
CURRENCIES = {"$": "dollar", "£": "pound sterling", "€": "euro", "¥": "yen", "₹": "rupee"}
NOT_UNITS = words(
    "about above all almost also although an and any anything approx approximately are around as "
    "at because below between but by can cannot certainly could correct depends different do does "
    "each either else error even every exactly except false few finite for from given greater "
    "guess has have hence if in incorrect infinite infinitely invalid is it least less let likely "
    "many maybe more most must nan nearly neither no none nor not null number numbers odd of on "
    "only or other otherwise over perhaps positive possible possibly prime probably real roughly "
    "since so solution solutions some something such sure than that the then there therefore "
    "think thus to true undefined under unknown until unless was we when where whether which "
    "whose with without wrong yes you"
)
OPERATOR_WORDS = {"and": "and", "or": "or", "approx": "≈", "approximately": "≈"} | {
    "about": "≈",
    "roughly": "≈",
}
_ZERO_TO_SIXTEEN = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen"
)
NUMBER_WORDS = {word: value for value, word in enumerate(_ZERO_TO_SIXTEEN.split())}
BASE_WORDS = {word: value for word, value in NUMBER_WORDS.items() if value > 1} | {
    "binary": 2,
    "octal": 8,
    "decimal": 10,
    "hex": 16,
    "hexadecimal": 16,
}
