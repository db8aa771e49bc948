"""placeholder"""


def render(source, **kw):
    return ""
