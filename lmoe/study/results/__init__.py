"""What a study or a comparison of runs has found: study.json, in words, tables, pictures and a page; needs no torch."""
