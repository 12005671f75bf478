// Attention and its two derivatives (docs/maths.md, section 6), as FlashAttention's: no square of scores beyond 64 x 64
// is ever in memory, but where a bias' gradient is asked for.
//
// A block owns 64 rows (forward; dq; d_dy and d_q with the row sums before them) or 64 keys (dk and dv; d_k and d_v) of
// a head and walks over the others, so nothing is added from two blocks and every sum has one order. Its own operands
// stay in shared memory, those that it walks over come tile by tile, the next one while one is multiplied.
//
// Bound: products of 2 rows keys d flops each: 2 forward, 3 + 4 backward, 14 + 8 in the double backward, where five
// are made twice by the rows' blocks and five once more by the keys'.
//
// Launch bounds ask for one block a multiprocessor: else ptxas spills a few bytes of some kernels to fit two.
#pragma once

#include "cuda/attention_tiles.cuh"

namespace fg::cuda {

// lse and row sums are float32 [N, heads, rows].
struct AttentionForward {
  AttentionSizes sizes;
  Heads q, k, v, y;
  HeadSquares bias;
  float* lse;
};

struct AttentionBackward {
  AttentionSizes sizes;
  Heads dy, q, k, v, y, dq, dk, dv;
  HeadSquares bias, dbias;
  const float* lse;
  float* delta;
};

// sums: [N, heads, 3, rows], each row's alpha, delta and shift.
struct AttentionDoubleBackward {
  AttentionSizes sizes;
  Heads dy, ddq, ddk, ddv, q, k, v, d_dy, d_q, d_k, d_v;
  HeadSquares bias, ddbias, d_bias;
  const float* lse;
  float* sums;
};

// Tiles of shared memory that the kernels ask for: `own` of their own operands, a square of scores, the stream's.
template <class T>
__host__ FG_MEMBER int shared_tiles(int own) {
  return own + 1 + BUFFERS<T>;
}

// Tiles of keys that rows [first, first + 64) see, and the first tile of rows that sees keys from `first` on.
FG_DEVICE int tiles_seen(const AttentionSizes& s, int first) {
  return tiles_of(s.causal ? min(s.keys, min(first + SIDE, s.rows)) : s.keys);
}
FG_DEVICE int first_tile_seeing(const AttentionSizes& s, int first) { return s.causal ? first / SIDE : 0; }

template <class T>
FG_DEVICE void request_tiles(const Plane& head, int first, int parts, T* to) {
  for (int part = 0; part < parts; ++part) request_tile(head, first, part, to + part * SQUARE);
}

// ---------------------------------------------------------------------------------------------- forward

// A row's maximum and sum so far, a thread's share of the sum (Milakov and Gimelshein, Online normalizer calculation
// for softmax, 2018).
template <class S>
struct Running {
  float highest[S::HELD_ROWS], total[S::HELD_ROWS];

  FG_MEMBER Running() {
    for (int i = 0; i < S::HELD_ROWS; ++i) highest[i] = lowest(), total[i] = 0.0f;
  }
  // Scores become exponentials from the new maximum on; shrink: what sums so far are to be multiplied by.
  FG_MEMBER void add(S& s, float (&shrink)[S::HELD_ROWS]) {
    float above[1][S::HELD_ROWS];
#pragma unroll
    for (int i = 0; i < S::HELD_ROWS; ++i) above[0][i] = highest[i];
    each_score(s, 0, 0, [&](int i, int j, int, int) { above[0][i] = fmaxf(above[0][i], s.value(i, j)); });
    across_row(s, above, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int i = 0; i < S::HELD_ROWS; ++i) {
      const float origin = above[0][i] == lowest() ? 0.0f : above[0][i];
      shrink[i] = expf(highest[i] - origin);
      highest[i] = above[0][i];
      total[i] *= shrink[i];
#pragma unroll
      for (int j = 0; j < S::HELD_COLUMNS; ++j) {
        s.value(i, j) = expf(s.value(i, j) - origin);
        total[i] += s.value(i, j);
      }
    }
  }
};

// y = scale of each row the sums, lse of its maximum and sum; a row that sees no key has 0 and 0.
template <class S, class Outputs, int PARTS>
FG_DEVICE void finish_rows(const S& s, const Running<S>& run, Outputs (&y)[PARTS], float* lse, int first, int rows) {
  float total[1][S::HELD_ROWS];
#pragma unroll
  for (int i = 0; i < S::HELD_ROWS; ++i) total[0][i] = run.total[i];
  across_row(s, total, added);
  once_a_row(s, first, rows, [&](int i, int row) {
    store(lse + row, total[0][i] == 0.0f ? 0.0f : run.highest[i] + logf(total[0][i]));
  });
#pragma unroll
  for (int part = 0; part < PARTS; ++part)
    each_score(y[part], 0, 0,
               [&](int i, int j, int, int) { y[part].value(i, j) *= total[0][i] == 0.0f ? 0.0f : 1.0f / total[0][i]; });
}

// Grid: the tiles of rows of every head.
template <class T, int PARTS>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1) attention_forward_kernel(AttentionForward a) {
  FG_DYN_SHARED(T, q);
  const AttentionSizes& sizes = a.sizes;
  const int of_d = tiles_of(sizes.d), of_dv = tiles_of(sizes.dv), turn = of_d + of_dv;
  const Owner own = Owner::of(sizes, sizes.rows);
  const HeadSquare bias = own.square(a.bias);
  T* square = q + of_d * SQUARE;
  request_tiles(own.plane<T>(a.q, sizes.rows, sizes.d), own.first, of_d, q);
  const auto request = [&](int step, T* to) {
    const int part = step % turn, first = step / turn * SIDE;
    const bool of_v = part >= of_d;
    const Plane keys = own.plane<T>(second_if(of_v, a.k, a.v), sizes.keys, of_v ? sizes.dv : sizes.d);
    request_tile(keys, first, of_v ? part - of_d : part, to);
  };
  const int tiles = tiles_seen(sizes, own.first);
  Stream<T, decltype(request)> stream(square + SQUARE, tiles * turn, request);

  OfRows<T> y[PARTS];
  Running<Scores<T>> run;
  for (int tile = 0; tile < tiles; ++tile) {
    Scores<T> s;
    for (int part = 0; part < of_d; ++part) s.slab(q + part * SQUARE, stream.take());
    finish_scores(s, sizes, bias, own.first, tile * SIDE);
    float shrink[Scores<T>::HELD_ROWS];
    run.add(s, shrink);
    put_scores(s, square);
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
      each_score(y[part], 0, 0, [&](int i, int j, int, int) { y[part].value(i, j) *= shrink[i]; });
    add_products(y, square, stream, of_dv);
  }
  finish_rows(Scores<T>(), run, y, a.lse + static_cast<i64>(own.head) * sizes.rows, own.first, sizes.rows);
  put_head<T>(y, own.plane<T>(a.y, sizes.rows, sizes.dv), own.first, 1.0f);
}

// ---------------------------------------------------------------------------------------------- backward

// delta[r] = <dy, y> of rows [first, first + 64), a warp a row.
template <class T>
FG_DEVICE void dot_rows(const Plane& dy, const Plane& y, int first, float* delta) {
  const int lane = threadIdx.x % WARP;
  for (int row = first + static_cast<int>(threadIdx.x) / WARP; row < min(first + SIDE, dy.rows);
       row += ATTENTION_THREADS / WARP) {
    Sums<1> dot = {{0.0f}};
    for (int c = lane; c < dy.columns; c += WARP)
      dot.word[0] += to_float(load(static_cast<const T*>(dy.data) + row * dy.pitch + c)) *
                     to_float(load(static_cast<const T*>(y.data) + row * y.pitch + c));
    merge_lanes(dot, 1);
    if (lane == 0) store(delta + row, dot.word[0]);
  }
}

// p: scores become probabilities. ds: dp becomes p (dp - delta).
template <class S>
FG_DEVICE void differentiate_scores(S& p, S& ds, const float (&lse)[S::HELD_ROWS], const float (&delta)[S::HELD_ROWS]) {
  to_probabilities(p, lse);
  each_score(p, 0, 0, [&](int i, int j, int, int) {
    ds.value(i, j) = score_derivative(p.value(i, j), ds.value(i, j), delta[i]);
  });
}

template <class S>
FG_DEVICE void put_square(const S& s, const AttentionSizes& sizes, const HeadSquare& to, int first_row, int first_key) {
  if (!to.data) return;
  each_score(s, first_row, first_key, [&](int i, int j, int row, int key) {
    if (sizes.seen(row, key)) store(to.at(row, key), s.value(i, j));
  });
}

// dq, dbias, and delta for the keys' kernel. Grid: the tiles of rows of every head.
template <class T, int PARTS>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1) attention_rows_kernel(AttentionBackward a) {
  FG_DYN_SHARED(T, q);
  const AttentionSizes& sizes = a.sizes;
  const int of_d = tiles_of(sizes.d), of_dv = tiles_of(sizes.dv), turn = 2 * of_d + of_dv;
  const Owner own = Owner::of(sizes, sizes.rows);
  const Plane dy_rows = own.plane<T>(a.dy, sizes.rows, sizes.dv);
  const HeadSquare bias = own.square(a.bias), dbias = own.square(a.dbias);
  T *dy = q + of_d * SQUARE, *square = dy + of_dv * SQUARE;
  request_tiles(own.plane<T>(a.q, sizes.rows, sizes.d), own.first, of_d, q);
  request_tiles(dy_rows, own.first, of_dv, dy);
  const auto request = [&](int step, T* to) {
    const int part = step % turn, first = step / turn * SIDE;
    const bool of_v = part >= of_d && part < of_d + of_dv;
    const Plane keys = own.plane<T>(second_if(of_v, a.k, a.v), sizes.keys, of_v ? sizes.dv : sizes.d);
    request_tile(keys, first, part < of_d ? part : of_v ? part - of_d : part - of_d - of_dv, to);
  };
  const int tiles = tiles_seen(sizes, own.first);
  Stream<T, decltype(request)> stream(square + SQUARE, tiles * turn, request);
  const i64 head = static_cast<i64>(own.head) * sizes.rows;
  dot_rows<T>(dy_rows, own.plane<T>(a.y, sizes.rows, sizes.dv), own.first, a.delta + head);
  __syncthreads();

  using S = Scores<T>;
  OfRows<T> dq[PARTS];
  float lse[S::HELD_ROWS], delta[S::HELD_ROWS];
  load_rows(S(), a.lse + head, own.first, sizes.rows, lse);
  load_rows(S(), a.delta + head, own.first, sizes.rows, delta);
  for (int tile = 0; tile < tiles; ++tile) {
    S p, ds;
    for (int part = 0; part < of_d; ++part) p.slab(q + part * SQUARE, stream.take());
    for (int part = 0; part < of_dv; ++part) ds.slab(dy + part * SQUARE, stream.take());
    finish_scores(p, sizes, bias, own.first, tile * SIDE);
    differentiate_scores(p, ds, lse, delta);
    put_square(ds, sizes, dbias, own.first, tile * SIDE);
    put_scores(ds, square);
    add_products(dq, square, stream, of_d);
  }
  put_head<T>(dq, own.plane<T>(a.dq, sizes.rows, sizes.d), own.first, sizes.scale);
}

// Grid: the tiles of keys of every head.
template <class T, int PARTS>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1) attention_keys_kernel(AttentionBackward a) {
  FG_DYN_SHARED(T, k);
  const AttentionSizes& sizes = a.sizes;
  const int of_d = tiles_of(sizes.d), of_dv = tiles_of(sizes.dv), turn = 2 * (of_d + of_dv);
  const Owner own = Owner::of(sizes, sizes.keys);
  const HeadSquare bias = own.square(a.bias);
  T *v = k + of_d * SQUARE, *square = v + of_dv * SQUARE;
  request_tiles(own.plane<T>(a.k, sizes.keys, sizes.d), own.first, of_d, k);
  request_tiles(own.plane<T>(a.v, sizes.keys, sizes.dv), own.first, of_dv, v);
  const int begin = first_tile_seeing(sizes, own.first), tiles = tiles_of(sizes.rows);
  const auto request = [&](int step, T* to) {  // q, dy, dy, q
    const int at = step % turn, first = (begin + step / turn) * SIDE, last = of_d + 2 * of_dv;
    const bool of_dy = at >= of_d && at < last;
    const Plane rows = own.plane<T>(second_if(of_dy, a.q, a.dy), sizes.rows, of_dy ? sizes.dv : sizes.d);
    request_tile(rows, first, of_dy ? (at - of_d) % of_dv : at < of_d ? at : at - last, to);
  };
  Stream<T, decltype(request)> stream(square + SQUARE, max(tiles - begin, 0) * turn, request);
  const i64 head = static_cast<i64>(own.head) * sizes.rows;

  using S = Scores<T>;
  OfKeys<T> dk[PARTS], dv[PARTS];
  for (int tile = begin; tile < tiles; ++tile) {
    S p, ds;
    for (int part = 0; part < of_d; ++part) p.slab(stream.take(), k + part * SQUARE);
    for (int part = 0; part < of_dv; ++part) ds.slab(stream.take(), v + part * SQUARE);
    finish_scores(p, sizes, bias, tile * SIDE, own.first);
    float lse[S::HELD_ROWS], delta[S::HELD_ROWS];
    load_rows(p, a.lse + head, tile * SIDE, sizes.rows, lse);
    load_rows(p, a.delta + head, tile * SIDE, sizes.rows, delta);
    differentiate_scores(p, ds, lse, delta);
    put_scores(p, square);
    add_products(dv, square, stream, of_dv);
    replace_scores(ds, square);
    add_products(dk, square, stream, of_d);
  }
  put_head<T>(dk, own.plane<T>(a.dk, sizes.keys, sizes.d), own.first, sizes.scale);
  put_head<T>(dv, own.plane<T>(a.dv, sizes.keys, sizes.dv), own.first, 1.0f);
}

// ---------------------------------------------------------------------------------------------- double backward

// Four squares of scores of a thread: p, dp, a and c, as docs/maths.md names them; then p, ds, g and r.
template <class S>
struct Squares {
  S p, dp, a, c;

  // lse: of the head.
  FG_MEMBER void finish(const AttentionSizes& sizes, const HeadSquare& bias, const HeadSquare& ddbias, const float* lse,
                        int first_row, int first_key) {
    float of_row[S::HELD_ROWS];
    load_rows(p, lse, first_row, sizes.rows, of_row);
    finish_scores(p, sizes, bias, first_row, first_key);
    to_probabilities(p, of_row);
    each_score(a, first_row, first_key, [&](int i, int j, int row, int key) {
      a.value(i, j) *= sizes.scale;
      if (ddbias.data && sizes.seen(row, key)) a.value(i, j) += load(ddbias.at(row, key));
    });
  }
  FG_MEMBER void add_to(float (&alpha_delta_gamma)[3][S::HELD_ROWS]) const {
    each_score(p, 0, 0, [&](int i, int j, int, int) {
      auto& row = alpha_delta_gamma;
      ScoreSums<float> sums = {row[0][i], row[1][i], row[2][i]};
      sums.add(p.value(i, j), dp.value(i, j), a.value(i, j), c.value(i, j));
      row[0][i] = sums.alpha, row[1][i] = sums.delta, row[2][i] = sums.gamma;
    });
  }
  // sums: of the head, alpha, delta and shift. Read for each square: in registers they would be spilled.
  FG_MEMBER void differentiate(const float* sums, int first_row, int rows) {
    float row[3][S::HELD_ROWS];
#pragma unroll
    for (int n = 0; n < 3; ++n) load_rows(p, sums + static_cast<i64>(n) * rows, first_row, rows, row[n]);
    each_score(p, 0, 0, [&](int i, int j, int, int) {
      const auto t = ScoreCotangents<float>::of(p.value(i, j), dp.value(i, j), a.value(i, j), c.value(i, j), row[0][i],
                                                row[1][i], row[2][i]);
      dp.value(i, j) = t.ds;
      a.value(i, j) = t.g;
      c.value(i, j) = t.r;
    });
  }
};

// Leaves the rows' alpha, delta and shift for this block, behind a barrier, and for the keys' kernel.
template <class S>
FG_DEVICE void leave_row_sums(float (&row)[3][S::HELD_ROWS], float* sums, int first, int rows) {
  const S s;
  across_row(s, row, added);
  once_a_row(s, first, rows, [&](int i, int at) {
    store(sums + at, row[0][i]);
    store(sums + static_cast<i64>(rows) + at, row[1][i]);
    store(sums + 2 * static_cast<i64>(rows) + at, row[0][i] * row[1][i] - row[2][i]);
  });
  __syncthreads();
}

// What step `at` of a tile of keys brings: pairs of k and ddk, of v and ddv; in the second walk v, ddv, k, ddk too.
struct KeyStep {
  bool of_v, cotangent;
  int part;

  static FG_MEMBER KeyStep of(int at, int of_d, int of_dv) {
    const int turn = 2 * (of_d + of_dv);
    const bool outputs = at >= turn;
    const int place = outputs ? at - turn : at, ahead = outputs ? 2 * of_dv : 2 * of_d;
    const bool of_v = (place < ahead) == outputs;
    const int behind = place < ahead ? place : place - ahead, parts = of_v ? of_dv : of_d;
    if (outputs) return {of_v, behind >= parts, behind % parts};
    return {of_v, behind % 2 == 1, behind / 2};
  }
};

// d_dy, d_q, d_bias, and the row sums for the keys' kernel. Grid: the tiles of rows of every head.
template <class T, int PARTS>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1) attention_double_rows_kernel(AttentionDoubleBackward b) {
  FG_DYN_SHARED(T, q);
  const AttentionSizes& sizes = b.sizes;
  const int of_d = tiles_of(sizes.d), of_dv = tiles_of(sizes.dv), turn = 2 * (of_d + of_dv);
  const Owner own = Owner::of(sizes, sizes.rows);
  const HeadSquare bias = own.square(b.bias), ddbias = own.square(b.ddbias), d_bias = own.square(b.d_bias);
  T *ddq = q + of_d * SQUARE, *dy = ddq + of_d * SQUARE, *square = dy + of_dv * SQUARE;
  request_tiles(own.plane<T>(b.q, sizes.rows, sizes.d), own.first, of_d, q);
  request_tiles(own.plane<T>(b.ddq, sizes.rows, sizes.d), own.first, of_d, ddq);
  request_tiles(own.plane<T>(b.dy, sizes.rows, sizes.dv), own.first, of_dv, dy);
  const int tiles = tiles_seen(sizes, own.first);
  const auto request = [&](int step, T* to) {
    const bool again = step >= tiles * turn;
    const int turns = again ? 2 * turn : turn, walked = again ? step - tiles * turn : step;
    const KeyStep at = KeyStep::of(walked % turns, of_d, of_dv);
    const Heads keys = second_if(at.of_v, second_if(at.cotangent, b.k, b.ddk), second_if(at.cotangent, b.v, b.ddv));
    request_tile(own.plane<T>(keys, sizes.keys, at.of_v ? sizes.dv : sizes.d), walked / turns * SIDE, at.part, to);
  };
  Stream<T, decltype(request)> stream(square + SQUARE, 3 * tiles * turn, request);

  using S = Scores<T>;
  const i64 head = static_cast<i64>(own.head) * sizes.rows;
  const auto squares = [&](int tile) {
    Squares<S> s;
    for (int part = 0; part < of_d; ++part) {
      T* keys = stream.take();
      s.p.slab(q + part * SQUARE, keys);
      s.a.slab(ddq + part * SQUARE, keys);
      s.a.slab(q + part * SQUARE, stream.take());
    }
    for (int part = 0; part < of_dv; ++part) {
      s.dp.slab(dy + part * SQUARE, stream.take());
      s.c.slab(dy + part * SQUARE, stream.take());
    }
    s.finish(sizes, bias, ddbias, b.lse + head, own.first, tile * SIDE);
    return s;
  };

  float row[3][S::HELD_ROWS] = {};
  for (int tile = 0; tile < tiles; ++tile) squares(tile).add_to(row);
  leave_row_sums<S>(row, b.sums + 3 * head, own.first, sizes.rows);

  OfRows<T> d_q[PARTS], d_dy[PARTS];
  for (int tile = 0; tile < tiles; ++tile) {
    Squares<S> s = squares(tile);
    s.differentiate(b.sums + 3 * head, own.first, sizes.rows);
    put_square(s.c, sizes, d_bias, own.first, tile * SIDE);
    put_scores(s.a, square);
    add_products(d_dy, square, stream, of_dv);  // g v
    replace_scores(s.p, square);
    add_products(d_dy, square, stream, of_dv);  // p ddv
    replace_scores(s.c, square);
    add_products(d_q, square, stream, of_d);  // r k
    replace_scores(s.dp, square);
    add_products(d_q, square, stream, of_d);  // ds ddk
  }
  put_head<T>(d_q, own.plane<T>(b.d_q, sizes.rows, sizes.d), own.first, sizes.scale);
  put_head<T>(d_dy, own.plane<T>(b.d_dy, sizes.rows, sizes.dv), own.first, 1.0f);
}

// Grid: the tiles of keys of every head.
template <class T, int PARTS>
__global__ void __launch_bounds__(ATTENTION_THREADS, 1) attention_double_keys_kernel(AttentionDoubleBackward b) {
  FG_DYN_SHARED(T, k);
  const AttentionSizes& sizes = b.sizes;
  const int of_d = tiles_of(sizes.d), of_dv = tiles_of(sizes.dv), turn = 2 * (2 * of_d + of_dv);
  const Owner own = Owner::of(sizes, sizes.keys);
  const HeadSquare bias = own.square(b.bias), ddbias = own.square(b.ddbias);
  T *ddk = k + of_d * SQUARE, *v = ddk + of_d * SQUARE, *ddv = v + of_dv * SQUARE, *square = ddv + of_dv * SQUARE;
  request_tiles(own.plane<T>(b.k, sizes.keys, sizes.d), own.first, of_d, k);
  request_tiles(own.plane<T>(b.ddk, sizes.keys, sizes.d), own.first, of_d, ddk);
  request_tiles(own.plane<T>(b.v, sizes.keys, sizes.dv), own.first, of_dv, v);
  request_tiles(own.plane<T>(b.ddv, sizes.keys, sizes.dv), own.first, of_dv, ddv);
  const int begin = first_tile_seeing(sizes, own.first), tiles = tiles_of(sizes.rows);
  const auto request = [&](int step, T* to) {  // pairs of q and ddq; dy, dy; q, ddq
    const int place = step % turn, of_q = 2 * of_d, last = of_q + 2 * of_dv;
    const bool of_dy = place >= of_q && place < last, outputs = place >= last;
    const int at = outputs ? place - last : of_dy ? place - of_q : place;
    const bool cotangent = outputs ? at >= of_d : at % 2;
    const Heads rows = second_if(of_dy, second_if(cotangent, b.q, b.ddq), b.dy);
    request_tile(own.plane<T>(rows, sizes.rows, of_dy ? sizes.dv : sizes.d), (begin + step / turn) * SIDE,
                 of_dy     ? at % of_dv
                 : outputs ? at % of_d
                           : at / 2,
                 to);
  };
  Stream<T, decltype(request)> stream(square + SQUARE, max(tiles - begin, 0) * turn, request);

  using S = Scores<T>;
  const i64 head = static_cast<i64>(own.head) * sizes.rows;
  OfKeys<T> d_k[PARTS], d_v[PARTS];
  for (int tile = begin; tile < tiles; ++tile) {
    Squares<S> s;
    for (int part = 0; part < of_d; ++part) {
      T* rows = stream.take();
      s.p.slab(rows, k + part * SQUARE);
      s.a.slab(rows, ddk + part * SQUARE);
      s.a.slab(stream.take(), k + part * SQUARE);
    }
    for (int part = 0; part < of_dv; ++part) {
      T* rows = stream.take();
      s.dp.slab(rows, v + part * SQUARE);
      s.c.slab(rows, ddv + part * SQUARE);
    }
    s.finish(sizes, bias, ddbias, b.lse + head, tile * SIDE, own.first);
    s.differentiate(b.sums + 3 * head, tile * SIDE, sizes.rows);
    put_scores(s.a, square);
    add_products(d_v, square, stream, of_dv);  // g^T dy
    replace_scores(s.c, square);
    add_products(d_k, square, stream, of_d);  // r^T q
    replace_scores(s.dp, square);
    add_products(d_k, square, stream, of_d);  // ds^T ddq
  }
  put_head<T>(d_k, own.plane<T>(b.d_k, sizes.keys, sizes.d), own.first, sizes.scale);
  put_head<T>(d_v, own.plane<T>(b.d_v, sizes.keys, sizes.dv), own.first, 1.0f);
}

}  // namespace fg::cuda
