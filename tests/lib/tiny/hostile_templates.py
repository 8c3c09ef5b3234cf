"""Chat templates that would take all time or memory if they were rendered without a limit."""

HARMLESS = "{% for m in messages %}{{ m.content }}{% endfor %}"
FREEZES_AT = "!!"
"""A first message at which `FREEZES` does so. Any other is rendered as by `HARMLESS`."""
FREEZES = (
    f"{{% if messages[0].content == '{FREEZES_AT}' %}}{{% set a = 'a' * 20000000 %}}"
    "{{ a.rfind('a' * 500000 ~ 'b' ~ 'a' * 500000) }}{% endif %}" + HARMLESS
)
ENDLESS = "{{ 'x' * 10 ** 11 }}"
