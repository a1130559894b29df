//! Topic filters in a tree, so that one walk finds everybody whose filter matches a topic. Pure.
//!
//! The cost of a walk is bounded by the topic's levels and the filters that share them, not by the number of filters.

use std::collections::HashMap;

use crate::message::TopicFilter;

const ROOT: usize = 0;

/// A value is kept once a filter; inserting it again under the same filter replaces it.
#[derive(Debug)]
pub struct FilterTrie<T> {
    nodes: Vec<Node<T>>,
    free: Vec<usize>,
}

#[derive(Debug)]
struct Node<T> {
    children: HashMap<Box<str>, usize>,
    plus: Option<usize>,
    here: Vec<T>,
    hash: Vec<T>,
}

impl<T> Default for Node<T> {
    fn default() -> Self {
        Node {
            children: HashMap::new(),
            plus: None,
            here: Vec::new(),
            hash: Vec::new(),
        }
    }
}

impl<T> Node<T> {
    fn is_empty(&self) -> bool {
        self.children.is_empty() && self.plus.is_none() && self.here.is_empty() && self.hash.is_empty()
    }
}

impl<T> Default for FilterTrie<T> {
    fn default() -> Self {
        FilterTrie {
            nodes: vec![Node::default()],
            free: Vec::new(),
        }
    }
}

impl<T> FilterTrie<T> {
    /// Inserts a value, or replaces the one for which `same` holds, which is returned.
    pub fn insert(&mut self, filter: &TopicFilter, value: T, same: impl Fn(&T) -> bool) -> Option<T> {
        let mut at = ROOT;
        let mut hash = false;
        for level in filter.levels() {
            match level {
                "#" => hash = true,
                "+" => {
                    at = match self.nodes[at].plus {
                        Some(next) => next,
                        None => {
                            let next = self.new_node();
                            self.nodes[at].plus = Some(next);
                            next
                        }
                    }
                }
                level => {
                    at = match self.nodes[at].children.get(level) {
                        Some(next) => *next,
                        None => {
                            let next = self.new_node();
                            self.nodes[at].children.insert(level.into(), next);
                            next
                        }
                    }
                }
            }
        }
        let values = if hash {
            &mut self.nodes[at].hash
        } else {
            &mut self.nodes[at].here
        };
        match values.iter_mut().find(|v| same(v)) {
            Some(old) => Some(std::mem::replace(old, value)),
            None => {
                // Most filters have one; a Vec would begin with room for four.
                if values.is_empty() {
                    values.reserve_exact(1);
                }
                values.push(value);
                None
            }
        }
    }

    /// Removes the value for which `same` holds, and the branches that nothing hangs on any more.
    pub fn remove(&mut self, filter: &TopicFilter, same: impl Fn(&T) -> bool) -> Option<T> {
        let mut path = vec![ROOT];
        let mut at = ROOT;
        let mut hash = false;
        for level in filter.levels() {
            at = match level {
                "#" => {
                    hash = true;
                    break;
                }
                "+" => self.nodes[at].plus?,
                level => *self.nodes[at].children.get(level)?,
            };
            path.push(at);
        }
        let values = if hash {
            &mut self.nodes[at].hash
        } else {
            &mut self.nodes[at].here
        };
        let index = values.iter().position(same)?;
        let removed = values.swap_remove(index);
        let levels: Vec<&str> = filter.levels().collect();
        for depth in (1..path.len()).rev() {
            let node = path[depth];
            if !self.nodes[node].is_empty() {
                break;
            }
            let parent = &mut self.nodes[path[depth - 1]];
            match levels[depth - 1] {
                "+" => parent.plus = None,
                level => {
                    parent.children.remove(level);
                }
            }
            self.nodes[node] = Node::default();
            self.free.push(node);
        }
        Some(removed)
    }

    /// Whether there is a filter whose first level is this one, literally.
    pub fn begins_with(&self, level: &str) -> bool {
        self.nodes[ROOT].children.contains_key(level)
    }

    fn new_node(&mut self) -> usize {
        self.free.pop().unwrap_or_else(|| {
            self.nodes.push(Node::default());
            self.nodes.len() - 1
        })
    }

    /// Calls `found` for every value whose filter matches (MQTT 5, 4.7), in no particular order.
    pub fn for_each_match(&self, topic: &str, mut found: impl FnMut(&T)) {
        // `$`-topics are hidden from a wildcard at the first level.
        let hide = topic.starts_with('$');
        self.walk(ROOT, Some(topic), hide, &mut found);
    }

    fn walk(&self, at: usize, rest: Option<&str>, hide: bool, found: &mut impl FnMut(&T)) {
        let node = &self.nodes[at];
        if !hide {
            node.hash.iter().for_each(&mut *found);
        }
        let Some(rest) = rest else {
            node.here.iter().for_each(found);
            return;
        };
        let (level, rest) = match rest.split_once('/') {
            Some((level, rest)) => (level, Some(rest)),
            None => (rest, None),
        };
        if let Some(next) = node.children.get(level) {
            self.walk(*next, rest, false, found);
        }
        if let Some(next) = node.plus
            && !hide
        {
            self.walk(next, rest, false, found);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(t: &str) -> TopicFilter {
        TopicFilter::new(t.to_owned()).expect(t)
    }

    /// Every combination of a few levels: the tree finds exactly what the filters by themselves match.
    #[test]
    fn agrees_with_the_filters_themselves() {
        let words = ["a", "b", "", "$SYS", "+", "#"];
        let mut filters = Vec::new();
        let mut topics = Vec::new();
        for x in words {
            for y in words.iter().map(|w| Some(*w)).chain([None]) {
                for z in words.iter().map(|w| Some(*w)).chain([None]) {
                    let text = [Some(x), y, z].into_iter().flatten().collect::<Vec<_>>().join("/");
                    if let Ok(f) = TopicFilter::new(text.clone())
                        && !filters.contains(&f)
                    {
                        filters.push(f);
                    }
                    if crate::message::Topic::new(text.clone()).is_ok() {
                        topics.push(text);
                    }
                }
            }
        }
        let mut trie = FilterTrie::default();
        for (i, f) in filters.iter().enumerate() {
            assert_eq!(trie.insert(f, i, |v| *v == i), None);
        }
        for round in 0..2 {
            for t in &topics {
                let mut found = Vec::new();
                trie.for_each_match(t, |i| found.push(*i));
                found.sort_unstable();
                let expected: Vec<usize> = (0..filters.len())
                    .filter(|i| (round == 0 || i % 2 == 0) && filters[*i].matches(t))
                    .collect();
                assert_eq!(found, expected, "{t}");
            }
            for (i, f) in filters.iter().enumerate().filter(|(i, _)| i % 2 == 1) {
                assert_eq!(trie.remove(f, |v| *v == i), if round == 0 { Some(i) } else { None });
            }
        }
        for (i, f) in filters.iter().enumerate().filter(|(i, _)| i % 2 == 0) {
            assert_eq!(trie.remove(f, |v| *v == i), Some(i));
        }
        assert_eq!(trie.nodes.len() - trie.free.len(), 1, "only the root is left");
    }

    #[test]
    fn the_same_value_is_replaced() {
        let mut trie = FilterTrie::default();
        assert_eq!(trie.insert(&filter("a/+"), (1, "old"), |v| v.0 == 1), None);
        assert_eq!(trie.insert(&filter("a/+"), (1, "new"), |v| v.0 == 1), Some((1, "old")));
        let mut found = Vec::new();
        trie.for_each_match("a/b", |v| found.push(*v));
        assert_eq!(found, [(1, "new")]);
    }
}
