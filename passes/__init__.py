"""The compiler: a graph in; a graph, or facts about it, out."""

if __name__ != "s2ft_compile.passes":  # a second copy would define every operator again
    raise ImportError(f"{__name__} is a folder of s2ft_compile: import s2ft_compile.passes instead")
