# It imports torch, which the tests do without.
collect_ignore = ['make_beams.py']
