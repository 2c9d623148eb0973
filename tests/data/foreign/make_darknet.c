// Trains the network of a .cfg with Darknet's own library, saves its weights and writes what it computes.
// make_darknet.py compiles and runs it: make_darknet CFG WEIGHTS NUMBERS OUTPUT, in float32.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <darknet.h>

// Each step keeps 0.99 of the old statistics, so that three of them would leave next to nothing.
enum { BEFORE = 3, ROUNDS = 40, AFTER = 5 };

// Convolutions of one place that pass channels on, so that normalization is all that the network learns.
static void make_identities(network* net) {
    for (int i = 0; i < net->n; ++i) {
        layer l = net->layers[i];
        if (l.type != CONVOLUTIONAL) continue;
        for (int j = 0; j < l.nweights; ++j) l.weights[j] = j % (l.c + 1) == 0;
    }
}

static void train(network* net, const float* input) {
    memcpy(net->input, input, sizeof(float) * net->inputs * net->batch);
    net->train = 1;
    *net->seen += net->batch;
    forward_network(net);
    backward_network(net);
    update_network(net);
    make_identities(net);
}

static void evaluate(network* net, float* input, FILE* out) {
    const float* y = network_predict(net, input);
    fwrite(y, sizeof(float), net->outputs * net->batch, out);
}

int main(int argc, char** argv) {
    if (argc != 5) return 2;
    network* net = load_network(argv[1], 0, 0);
    const size_t size = (size_t)net->inputs * net->batch;
    float* numbers = malloc(sizeof(float) * size * (BEFORE + 1 + AFTER + 1));
    FILE* in = fopen(argv[3], "rb");
    if (!in || fread(numbers, sizeof(float), size * (BEFORE + 1 + AFTER + 1), in) == 0) return 3;
    memcpy(net->truth, numbers + size * (BEFORE + 1 + AFTER), sizeof(float) * size);
    make_identities(net);
    for (int i = 0; i < ROUNDS * BEFORE; ++i) train(net, numbers + size * (i % BEFORE));
    save_weights(net, argv[2]);
    FILE* out = fopen(argv[4], "wb");
    evaluate(net, numbers + size * BEFORE, out);
    for (int i = 0; i < AFTER; ++i) train(net, numbers + size * (BEFORE + 1 + i));
    evaluate(net, numbers + size * BEFORE, out);
    for (int i = 0; i < net->n; ++i) {
        layer l = net->layers[i];
        if (l.type != CONVOLUTIONAL) continue;
        const float* vectors[] = {l.scales, l.biases, l.rolling_mean, l.rolling_variance};
        for (int j = 0; j < 4; ++j) fwrite(vectors[j], sizeof(float), l.n, out);
    }
    fclose(out);
    return 0;
}
