"""What a forward pass does with its parameters, read off its jaxpr.

`interpreter` walks the equations; `products`, `elementwise`, `rearranging`,
`indexing` and `control` say what each primitive does to the abstract values of
`values`, and write down in `record` which parameter enters which product.
"""
