//! The store itself, and the only page that touches it.
//!
//! A store of another kind would be a server; here it is a map behind a lock, found by name, so
//! that a source and a target exist side by side in one process, and a driver value that comes
//! after a crash finds the same store again.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use stillpoint_core::error::{Error, Kind, Result};
use stillpoint_core::position::{Identity, Position, Stamp};

static STORES: Mutex<BTreeMap<String, Store>> = Mutex::new(BTreeMap::new());
static STORES_MADE: AtomicU64 = AtomicU64::new(0);

/// A value and the number of the write that made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Value {
    pub(super) bytes: Arc<Vec<u8>>,
    pub(super) version: u64,
}

/// Keys and values at one moment. Shared, never changed while anyone else holds it.
pub(super) type View = Arc<BTreeMap<String, Value>>;

/// One in-process store. Clones speak of the same store.
#[derive(Debug, Clone)]
pub struct Store {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    name: String,
    /// Changes whenever the content was replaced as a whole, because versions start anew then.
    generation: u64,
    writes: u64,
    view: View,
    pins: BTreeMap<String, Pinned>,
    stamp: Option<Stamp>,
}

/// A view that the store keeps until it is unpinned.
#[derive(Debug, Clone)]
pub(super) struct Pinned {
    pub(super) view: View,
    pub(super) generation: u64,
    pub(super) position: Position,
}

impl Store {
    /// Makes an empty store, or returns the one of this name.
    pub fn create(name: &str) -> Self {
        let mut stores = STORES.lock().expect("no holder panics");
        stores.entry(name.to_owned()).or_insert_with(|| Self::new(name)).clone()
    }

    fn new(name: &str) -> Self {
        let state = State {
            name: name.to_owned(),
            generation: STORES_MADE.fetch_add(1, Ordering::Relaxed),
            writes: 0,
            view: View::default(),
            pins: BTreeMap::new(),
            stamp: None,
        };
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Forgets the store of this name; values that hold it keep it alive.
    pub fn remove(name: &str) {
        STORES.lock().expect("no holder panics").remove(name);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    /// Creates or replaces a value.
    pub fn put(&self, key: &str, bytes: impl Into<Vec<u8>>) {
        let mut state = self.lock();
        state.writes += 1;
        let value = Value { bytes: Arc::new(bytes.into()), version: state.writes };
        // Copies the map if a pin shares it: the writer pays, the cut never does.
        Arc::make_mut(&mut state.view).insert(key.to_owned(), value);
    }

    /// Deletes a value and says whether it was there.
    pub fn delete(&self, key: &str) -> bool {
        let mut state = self.lock();
        state.writes += 1;
        Arc::make_mut(&mut state.view).remove(key).is_some()
    }

    /// All keys and values.
    pub fn content(&self) -> BTreeMap<String, Vec<u8>> {
        self.lock().view.iter().map(|(key, value)| (key.clone(), value.bytes.to_vec())).collect()
    }

    /// How many pins the store holds. Zero once everything was released.
    pub fn pins(&self) -> usize {
        self.lock().pins.len()
    }

    pub(super) fn view(&self) -> View {
        Arc::clone(&self.lock().view)
    }

    pub(super) fn position(&self) -> Position {
        position(&self.lock())
    }

    pub(super) fn identity(&self) -> Identity {
        identity(&self.lock().name)
    }

    pub(super) fn stamp(&self) -> Option<Stamp> {
        self.lock().stamp.clone()
    }

    pub(super) fn set_stamp(&self, stamp: Stamp) {
        self.lock().stamp = Some(stamp);
    }

    /// Keeps the current view under `pin`; a second call changes nothing.
    pub(super) fn pin(&self, pin: &str) -> Pinned {
        let mut state = self.lock();
        let now = Pinned { view: Arc::clone(&state.view), generation: state.generation, position: position(&state) };
        state.pins.entry(pin.to_owned()).or_insert(now).clone()
    }

    pub(super) fn pinned(&self, pin: &str) -> Option<Pinned> {
        self.lock().pins.get(pin).cloned()
    }

    pub(super) fn unpin(&self, pin: &str) {
        self.lock().pins.remove(pin);
    }

    /// Puts `view` in the place of the content and keeps the old under the name `kept`.
    pub(super) fn swap(&self, view: BTreeMap<String, Value>, kept: Option<&str>) {
        let mut state = self.lock();
        let old = std::mem::replace(&mut state.view, Arc::new(view));
        state.writes += 1;
        state.generation = STORES_MADE.fetch_add(1, Ordering::Relaxed);
        drop(state);
        if let Some(kept) = kept {
            Self::create(kept).lock().view = old;
        }
    }
}

fn position(state: &State) -> Position {
    Position::new("writes", format!("{}.{}", state.generation, state.writes))
}

/// Finds a store; what is expected and absent is an error, never an empty store.
pub(super) fn find(name: &str) -> Result<Store> {
    STORES.lock().expect("no holder panics").get(name).cloned().ok_or_else(|| {
        Error::new(Kind::NotFound, format!("there is no store `{name}` in this process"))
            .hint("memory stores live and end with the process that made them")
    })
}

/// The address is all that tells memory stores apart: they have no id that a copy would share.
pub(super) fn identity(name: &str) -> Identity {
    Identity { driver: "memory".to_owned(), native: None, endpoint: format!("memory:{name}") }
}
