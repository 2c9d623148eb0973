// Memory for outputs: those of a forward that their readers forget, and those that a backward makes again. A part of
// autograd.cpp.

// ---------------------------------------------------------------------------------------------- memory of outputs
// The strides of a dense result of that order.
std::vector<int64_t> strides_of(at::IntArrayRef sizes, at::MemoryFormat format) {
  if (format == at::MemoryFormat::ChannelsLast) return c10::get_channels_last_strides_2d(sizes);
  if (format == at::MemoryFormat::ChannelsLast3d) return c10::get_channels_last_strides_3d(sizes);
  return at::detail::defaultStrides(sizes);
}

// A tensor like x but for its sizes, in memory that is there.
at::Tensor laid_in(c10::Storage storage, const at::Tensor& x, at::IntArrayRef sizes) {
  const at::Tensor y = at::empty({0}, x.options().requires_grad(false));
  return y.set_(std::move(storage), 0, sizes, strides_of(sizes, x.suggest_memory_format()));
}

// The same in memory of its own, with huge pages if it is large.
at::Tensor fresh_like(const at::Tensor& x, at::IntArrayRef sizes) {
  at::Tensor y = at::empty(sizes, x.options().requires_grad(false).memory_format(x.suggest_memory_format()));
  operators->advise(lend(y));
  return y;
}

// The sizes of outputs that a thread has asked for in contexts, one list a context. Training steps repeat, so the list
// that begins like the one at hand tells what will be asked for next.
class Requests {
 public:
  void begin() {
    if (!now_.empty() && std::find(known_.begin(), known_.end(), now_) == known_.end()) {
      if (known_.size() == kMost) known_.pop_front();
      known_.push_back(std::move(now_));
    }
    now_.clear();
    followed_ = nullptr;
    is_known_ = true;
  }

  void add(size_t bytes) {
    now_.push_back(bytes);
    if (!is_known_ || (followed_ && begins_like_now(*followed_))) return;
    const auto found =
        std::find_if(known_.rbegin(), known_.rend(), [&](const auto& each) { return begins_like_now(each); });
    is_known_ = found != known_.rend();
    followed_ = is_known_ ? &*found : nullptr;
  }

  // Whether the requests to come are known.
  bool are_known() const { return is_known_ && followed_; }

  // Whether `test` holds for one of them.
  template <class Test>
  bool any_to_come(Test test) const {
    return std::any_of(followed_->begin() + int64_t(now_.size()), followed_->end(), test);
  }

 private:
  using List = std::vector<size_t>;
  static constexpr size_t kMost = 4;  // networks that take turns, or batches of several sizes

  bool begins_like_now(const List& list) const {
    return list.size() >= now_.size() && list[now_.size() - 1] == now_.back() &&
           (&list == followed_ || std::equal(now_.begin(), now_.end(), list.begin()));
  }

  std::deque<List> known_;
  List now_;
  const List* followed_ = nullptr;
  bool is_known_ = true;
};

// Memory for outputs of a forward that their readers forget. Such an output is gone when the next but one is made. In
// an allocator's memory a tensor that is kept would take its place, and a somewhat larger output would not fit there
// any more. So outputs have blocks of their own, and give them back when nobody holds them. The blocks are freed when
// the context ends, or when a backward in it makes its first output again; and before that those that no output to come
// would fit in, so that the largest of a network that narrows do not stay until its end.
class Blocks {
 public:
  // Before the first output of a context.
  void begin() { requests_.begin(); }

  // Of a tensor like x but for its sizes; undefined where it is small, or where nothing to come would fit in its place.
  at::Tensor output(const at::Tensor& x, at::IntArrayRef sizes) {
    const size_t bytes = size_t(c10::multiply_integers(sizes)) * x.element_size();
    if (bytes < kLeast) return {};
    requests_.add(bytes);
    const std::shared_ptr<Block> block = free_for(bytes);
    if (!block) return {};
    block->is_lent = true;
    auto* const held = new std::shared_ptr<Block>(block);
    const auto give_back = [](void* context) {
      auto* const held = static_cast<std::shared_ptr<Block>*>(context);
      (*held)->is_lent = false;
      delete held;
    };
    c10::Storage storage(c10::Storage::use_byte_size_t(), bytes,
                         c10::DataPtr(block->memory.data_ptr(), held, give_back, at::kCPU), c10::GetAllocator(at::kCPU),
                         /*resizable=*/true);
    return laid_in(std::move(storage), x, sizes);
  }

  void free() { blocks_.clear(); }

 private:
  struct Block {
    at::Tensor memory;
    std::atomic<bool> is_lent{false};
    int unused = 0;  // outputs since the last that lay there
  };
  static constexpr size_t kLeast = 1 << 18;
  static constexpr int kMostUnused = 4;

  static bool fits(size_t bytes, size_t block) { return bytes <= block && block - block / 4 <= bytes; }
  bool is_wanted(size_t block) const {
    return requests_.any_to_come([=](size_t bytes) { return fits(bytes, block); });
  }

  // Outputs of a dense block grow a little from layer to layer. What is lent and forgotten here lives as long as its
  // output.
  std::shared_ptr<Block> free_for(size_t bytes) {
    std::shared_ptr<Block> best;
    bool is_growing = false;
    for (auto& each : blocks_) {
      if (each->is_lent) continue;
      const size_t size = each->memory.nbytes();
      if (fits(bytes, size)) {
        best = each;
      } else if (size < bytes && bytes - bytes / 4 <= size) {
        is_growing = true;
        each->unused = kMostUnused;
      }
    }
    const bool are_known = requests_.are_known();
    for (size_t i = blocks_.size(); i-- > 0;) {
      Block& each = *blocks_[i];
      each.unused = blocks_[i] == best ? 0 : each.unused + 1;
      if (each.unused > kMostUnused || (are_known && !is_wanted(each.memory.nbytes()))) {
        blocks_[i].swap(blocks_.back());
        blocks_.pop_back();
      }
    }
    if (best) return best;
    const size_t size = is_growing ? bytes + bytes / 4 : bytes;
    if (are_known && !is_wanted(size)) return nullptr;
    best = std::make_shared<Block>();
    best->memory = at::empty({int64_t(size)}, at::kByte);
    operators->advise(lend(best->memory));
    blocks_.push_back(best);
    return best;
  }

  Requests requests_;
  std::vector<std::shared_ptr<Block>> blocks_;
};
thread_local Blocks blocks;

// The notes that stand in graphs for tensors that will be made again, by the numbers of their readers: a backward comes
// to the lowest number last.
class Notes {
 public:
  class Note {
   public:
    explicit Note(uint64_t reader) : place_(all().add(reader)) {}
    ~Note() { all().remove(place_); }
    Note(const Note&) = delete;
    Note& operator=(const Note&) = delete;
    // Whether no other is to come; also false where other graphs have some that are as old.
    bool is_last() const { return all().is_first(place_); }

   private:
    std::multiset<uint64_t>::iterator place_;
  };

 private:
  static Notes& all() {
    static auto* const notes = new Notes;  // for good: graphs may outlive what is static
    return *notes;
  }
  std::multiset<uint64_t>::iterator add(uint64_t reader) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return readers_.insert(reader);
  }
  void remove(std::multiset<uint64_t>::iterator place) {
    const std::lock_guard<std::mutex> lock(mutex_);
    readers_.erase(place);
  }
  bool is_first(std::multiset<uint64_t>::iterator place) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return *place == *readers_.begin();
  }

  std::mutex mutex_;
  std::multiset<uint64_t> readers_;
};

// Memory for outputs that are made again during a backward, one after the other: each is needed for one reader alone,
// so the next takes its place, in pages and cache lines that are there. It is given back when the backward ends, or
// with the last of them.
class Scratch {
 public:
  static void release();

  // While the last output of a backward is made.
  class OfLast {
   public:
    explicit OfLast(bool is_last) : before_(std::exchange(making_last, is_last)) {}
    ~OfLast() { making_last = before_; }
    OfLast(const OfLast&) = delete;
    OfLast& operator=(const OfLast&) = delete;

   private:
    const bool before_;
  };

  // A tensor of the shape, dtype and memory format of x.
  at::Tensor like(const at::Tensor& x) {
    const int64_t task = torch::autograd::get_current_graph_task_id();
    const size_t bytes = size_t(x.numel()) * x.element_size();
    if (task == -1)
      return at::empty(x.sizes(), x.options().requires_grad(false).memory_format(x.suggest_memory_format()));
    if (task != task_) {
      *this = Scratch();
      blocks.free();
      task_ = task;
      torch::autograd::Engine::get_default_engine().queue_callback(release);
    }
    const bool is_free = storage_ && storage_.use_count() == 1;
    if (is_free && storage_.nbytes() >= bytes && storage_.nbytes() / 4 <= bytes)
      return laid_in(making_last ? std::exchange(storage_, c10::Storage()) : storage_, x, x.sizes());
    if (is_free || making_last) storage_ = c10::Storage();  // before there are two
    const at::Tensor y = fresh_like(x, x.sizes());
    if (!making_last) storage_ = y.storage();
    return y;
  }

  // Keeps what was made of a source from the reader of what was made of it in turn to the batch normalization before
  // that, whose turn is next.
  void hold(std::shared_ptr<const void> of, const at::Tensor& x) {
    if (torch::autograd::get_current_graph_task_id() != task_ || task_ == -1) return;
    held_of_ = std::move(of);
    held_ = x;
  }

  // What is held of a source, which is then held no more; else an undefined tensor.
  at::Tensor take(const void* of) {
    if (held_of_.get() != of || torch::autograd::get_current_graph_task_id() != task_) return {};
    held_of_.reset();
    return std::exchange(held_, at::Tensor());
  }

 private:
  static thread_local bool making_last;

  c10::Storage storage_;
  std::shared_ptr<const void> held_of_;
  at::Tensor held_;
  int64_t task_ = -1;
};
thread_local bool Scratch::making_last = false;
thread_local Scratch scratch;
void Scratch::release() { scratch = Scratch(); }
