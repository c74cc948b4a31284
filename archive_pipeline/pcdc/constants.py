"""Numbers that are part of the bitstream format; changing one makes another format."""

STRIDE = 16  # pixels per latent
HYPER_STRIDE = 4  # latents per hyper-latent
BLOCK = 2  # latents per side of an allocation block
BLOCK_SIDE = BLOCK * STRIDE  # the same in pixels

CELL = 8  # pixels a side of what networks have one place of features for, at their finest
CELL_SAMPLES = 3 * CELL**2

STEPS_PER_OCTAVE = 8  # steps and scales share this spacing, so a step shifts a scale index
FINEST_STEP = 4.0  # step of exponent 0, in units of an orthonormal transform of 0..255 pixels
MAX_EXPONENT = 63  # step exponents are 0..63: steps 4 .. 939
LEVEL_OFFSETS = (8, 4, 0, -4, -8)  # delta(beta) for beta = 1..5: level 5 preserves most
BASE_LEVEL = 3  # what the first block's level is told against
MIN_IMAGE_STEP = -min(LEVEL_OFFSETS)
MAX_IMAGE_STEP = MAX_EXPONENT - max(LEVEL_OFFSETS)

SCALE_COUNT = 80  # scale indices 0..79
SCALE_ZERO = 32  # scale index of standard deviation 1 (in steps)
FIRST_CODED_SCALE = 10  # below it a symbol is zero by definition and is not coded
LATENT_GAIN = 128.0  # networks work on y / LATENT_GAIN, of order one

# The scale network is integers: weights are multiples of 2^-8 of at most 11 bits, activations
# multiples of 2^-4 of 12 bits, from 0 on.
WEIGHT_BITS = 8
ACTIVATION_BITS = 4
WEIGHT_LIMIT = 1023
ACTIVATION_LIMIT = 4095
# Its last layer gives scale indices: shifted by 12 they would be plain integers. Index units are
# coarse, and a gain of 2^3 lets the optimiser move them in useful time.
LAST_SCALE_SHIFT = 9
LAST_SCALE_CEILING = 255
PRIOR_KNOTS = MAX_EXPONENT // STEPS_PER_OCTAVE + 2  # of each hyper-latent's channel
PRIOR_GAIN = 16  # likewise: an index is so many times a knot

HYPER_LIMIT = 127  # hyper-latents are integers in -127..127

# Of the encoder, not of the format: bits that the squared error of a symbol is worth, in steps. At
# equal bits, lower ones gain SSIMULACRA 2 and lose LPIPS.
ERROR_WEIGHT = 20.0
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601)
