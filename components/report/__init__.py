"""One self-contained page a run: what one looks at to decide about a guide.

`page.write` makes it of a `content.Report` and of the pictures that `gallery` chose. It is one file
that asks for nothing: styles, script, plots and pictures are in it. It stays small because pictures
do: at most `gallery.EDGE` pixels a side, WebP, `gallery.NUM_FIRST` + `gallery.NUM_WORST` of each
model and number of steps, and fewer where all of them would have more than `gallery.MOST_BYTES`.
With very many models and steps, some have none.
"""
