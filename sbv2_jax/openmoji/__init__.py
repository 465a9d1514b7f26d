"""The OpenMoji world: captioned pictures of drawings, and the pipeline that learnt to draw them."""
